"""RoPE: every true respelling fuses once and stays within the bound; no near miss changes a result."""

from __future__ import annotations

import pytest
import torch

import npu_fuse
from npu_fuse.report import Status

from . import near, parts_rotary_mul
from .helpers import MODES, NEAR_MODES, assert_one_fused, modes_of, sites, through_torch_compile
from .near_rotary_mul import GUARDED, NEAR_MISSES
from .programs import program

SPELLINGS = (*parts_rotary_mul.NAMED, *parts_rotary_mul.combined(96))


@pytest.mark.parametrize("index", range(len(SPELLINGS)), ids=[p.name for p in SPELLINGS])
def test_respelling_fuses(index):
    spelling = SPELLINGS[index]
    for mode in modes_of(index, spelling in parts_rotary_mul.NAMED):
        reports = through_torch_compile(spelling, mode, parts_rotary_mul.inputs(mode.dtype))
        assert_one_fused(reports, {"rotary_mul"})


def test_a_table_written_between_two_rotations():
    text = (
        "r = torch.cat((-x[..., 8:], x[..., :8]), -1); y = x * C[:, None] + r * S[:, None]; C.mul_(2)\n"
        "z = x * 2; q = torch.cat((-z[..., 8:], z[..., :8]), -1)\n"
        "y, z * C[:, None] + q * S[:, None]"
    )
    reports = through_torch_compile(
        program("", parts_rotary_mul.INPUTS, text), MODES[2], parts_rotary_mul.inputs(MODES[2].dtype)
    )
    assert [s.status for s in sites(reports)] == [Status.FUSED] * 2


@pytest.mark.parametrize("miss", (*NEAR_MISSES, *GUARDED), ids=str)
@pytest.mark.parametrize("mode", NEAR_MODES, ids=str)
def test_near_miss_changes_nothing(miss, mode):
    near.check(miss, mode, parts_rotary_mul.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("miss", (*NEAR_MISSES, *GUARDED), ids=str)
@pytest.mark.parametrize("mode", [m for m in MODES if m not in NEAR_MODES], ids=str)
def test_near_miss_changes_nothing_in_the_other_modes(miss, mode):
    near.check(miss, mode, parts_rotary_mul.inputs)


def test_tables_are_made_under_the_autocast_of_the_rotation():
    def rotated(x, c, s):
        first, second = torch.split(x, [8, 8], dim=-1)
        with torch.autocast("cpu", torch.bfloat16):
            sin = s[:, None]
        cos = c[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x, c, s = (torch.rand(shape).half() for shape in ((2, 3, 5, 16), (2, 5, 8), (2, 5, 8)))
    npu_fuse.clear_reports()
    compiled = torch.compile(rotated, backend="npu_fuse", options={"target": "reference", "handoff": "eager"})
    halved = torch.finfo(torch.float16).eps  # of values around one, eager rounds both products before the sum
    torch.testing.assert_close(compiled(x, c, s), rotated(x, c, s), rtol=2 * halved, atol=2 * halved)
    assert [site.status for site in sites(npu_fuse.reports())] == [Status.FUSED]


def test_tables_narrower_than_x_are_no_rounding():
    def rotated(x, c, s):
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    x, c, s = (torch.rand(shape).bfloat16() for shape in ((2, 3, 5, 16), (5, 8), (5, 8)))
    npu_fuse.clear_reports()
    compiled = torch.compile(rotated, backend="npu_fuse", options={"target": "reference", "handoff": "eager"})
    torch.testing.assert_close(compiled(x, c, s), rotated(x, c, s))
    assert [site.status for site in sites(npu_fuse.reports())] == [Status.FUSED]


@pytest.mark.parametrize("device, status", [("cuda", Status.FUSED), ("cpu", Status.MISSED)])
def test_autocast_inside_counts_only_for_the_tensors_device(device, status):
    def half_turn(x):
        with torch.autocast(device, enabled=False):
            return torch.cat((-x[..., 8:], x[..., :8]), -1)

    def rotated(x, c, s):
        return x * c + half_turn(x) * s

    x, c, s = (torch.rand(shape) for shape in ((2, 3, 5, 16), (5, 16), (5, 16)))
    npu_fuse.clear_reports()
    compiled = torch.compile(rotated, backend="npu_fuse", options={"target": "reference", "handoff": "eager"})
    torch.testing.assert_close(compiled(x, c, s), rotated(x, c, s))
    assert [site.status for site in sites(npu_fuse.reports())] == [status]


def test_tables_from_another_autocast_region():
    def rotated(x, c, s):
        with torch.autocast("cpu", torch.bfloat16):
            cos, sin = (torch.cat((t, t), -1)[:, None] for t in (c, s))
        return x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin

    x, c, s = (torch.rand(shape) for shape in ((2, 3, 5, 16), (2, 5, 8), (2, 5, 8)))
    npu_fuse.clear_reports()
    compiled = torch.compile(rotated, backend="npu_fuse", options={"target": "reference", "handoff": "eager"})
    torch.testing.assert_close(compiled(x, c, s), rotated(x, c, s))
    assert [site.status for site in sites(npu_fuse.reports())] == [Status.FUSED]
