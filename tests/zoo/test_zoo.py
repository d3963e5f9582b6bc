"""Coverage and correctness on a representative quarter of the decoders; `bench/coverage.py` runs the rest.

    pytest tests/zoo -m zoo

Each case compiles a tiny model with npu_fuse and with the hand-off alone. The number of sites to fuse comes from
truth.json, counted without npu_fuse; what lacks in a model on purpose is in `UNFUSABLE`, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from . import catalog, grouping, measure, truth
from .unfusable import UNFUSABLE

pytestmark = pytest.mark.zoo

QUARTER = catalog.names("quarter")
OTHER_MODES = ("fp32", "bf16-train", "fp32-train", "autocast-train", "dynamic")
# One of each family of spellings, for the modes that cost more.
FEW = ("llama", "gemma3_text", "gpt_oss", "glm", "youtu", "qwen3_moe", "itt:qwen2_5_vl")
FIRST = 24  # of the quarter in every run; the others, and the other modes, are marked slow
CASES = [
    *(("bf16", name) for name in QUARTER[:FIRST]),
    *(pytest.param("bf16", name, marks=pytest.mark.slow) for name in QUARTER[FIRST:]),
    *(pytest.param(mode, name, marks=pytest.mark.slow) for mode in OTHER_MODES for name in FEW),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_architecture(mode: str, name: str) -> None:
    record = measure.measure(name, mode)
    if record["plain_error"]:
        pytest.skip(f"does not run with the hand-off alone: {record['plain_error']}")

    assert not record["fused_error"]
    assert not record["faults"]
    assert record["graphs"][0] == record["graphs"][1]
    assert record["guards"][1] <= record["guards"][0]
    assert record["accuracy"]["within_bound"], record["accuracy"]

    wanted = truth.load()[name]["expected"]
    sites = record["sites"]
    for op, number in wanted.items():
        done = sites.get("fused", {}).get(op, 0) + sites.get("refused_by_profit", {}).get(op, 0)
        excused, _ = UNFUSABLE.get(name, {}).get(op, (0, ""))
        assert done + excused >= number, f"{op}: {done} of {number}; not fused: {record['unfused']}"


LOOPS = (
    "qwen2_moe", "gpt_oss", "granitemoe", "jetmoe", "dbrx", "nemotron_h", "afmoe", "bailing_hybrid", "flex_olmo",
    "glm4_moe_lite", "hunyuan_v1_moe", "hy_v4", "mimo_v2_flash", "qwen3_next", "zaya", "itt:aria",
    "itt:glm5_next", "itt:minimax_m3_vl", "itt:qwen3_vl_moe", "itt:qwen4_exp",
)  # fmt: skip
"""Of the quarter, those whose experts are loops under `experts_implementation="eager"`."""
OTHERWISE = {"jetmoe": 2}
"""Loops that are no sum of experts: attention whose queries come from experts."""
LOOP_CASES = [
    *(("bf16", name) for name in LOOPS[:6]),
    *(pytest.param("bf16", name, marks=pytest.mark.slow) for name in LOOPS[6:]),
    *(pytest.param("fp32-train", name, marks=pytest.mark.slow) for name in LOOPS),
]


@pytest.mark.parametrize(("mode", "name"), LOOP_CASES)
def test_loops_over_experts_are_grouped(mode: str, name: str) -> None:
    record = grouping.measure_grouping(name, mode)
    assert record["loops"] > 0 and not record["fused_error"]
    assert record["grouped"] + OTHERWISE.get(name, 0) == record["loops"], record
    assert record["accuracy"]["within_bound"], record["accuracy"]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "glm", "youtu", "hy_v4", "reformer", "codegen"])
def test_counter_agrees_with_given_counts(name: str) -> None:
    """The counter that judges is itself held to counts that another counter made; `UNFUSABLE` says where it differs."""
    given = truth.load()[name]
    assert given["source"] == "given"
    excused = {op: count for op, (count, _) in UNFUSABLE.get(name, {}).items()}
    wanted = {op: number - excused.get(op, 0) for op, number in given["expected"].items()}
    assert truth.expected(truth.measure(name)["kinds"]) == wanted


def test_quarter_is_known() -> None:
    known = truth.load()
    assert len(set(QUARTER)) == len(QUARTER) >= 64
    assert set(QUARTER) <= set(known)
    assert set(QUARTER) <= set(catalog.names("decoders"))
