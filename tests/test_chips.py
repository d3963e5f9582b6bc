"""Plans for chips that are not here, without torch_npu: what each refuses, and the source of the limit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from npu_fuse import chip_table, explain
from npu_fuse.chip_names import EXAMPLES, family
from npu_fuse.cli import main
from npu_fuse.errors import OptionError, TargetError
from npu_fuse.options import Options
from npu_fuse.report import Status
from npu_fuse.targets.chips import SUPPORT, chip_limit

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
A2, A3, A5, P310, A910 = EXAMPLES


def planned(function, *args, soc=A2, train=False, **options):
    """(op, status, reason) of every site."""
    report = explain(function, *args, train=train, options={"target": "npu", "soc": soc, **options})
    assert not report.failures and all(not g.errors and g.soc == soc for g in report.graphs)
    return [(s.op, s.status, s.reason) for g in report.graphs for s in g.sites]


def only(function, *args, **options):
    (found,) = planned(function, *args, **options)
    return found


def norm(x, w):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def pairs(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin


def rotated(width, dtype=F16, batch=1, shape=(2, 4, 8)):
    angles = torch.randn(batch, 1, shape[2], width // 2)
    full = torch.cat((angles, angles), -1)
    return torch.randn(*shape, width, dtype=dtype), full.cos().to(dtype), full.sin().to(dtype)


def paired(width, dtype=F16):
    angles = torch.randn(1, 1, 8, width // 2).repeat_interleave(2, -1)
    return torch.randn(2, 4, 8, width, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def swiglu(x):
    a, b = x.chunk(2, -1)
    return nn.functional.silu(a) * b


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ascend910B3", "A2"), ("910B", "A2"), ("Ascend910_9391", "A3"), ("910_93", "A3"), ("Ascend950PR_9599", "A5"),
        ("950", "A5"), ("Ascend310P3", "310P"), ("310p", "310P"), ("Ascend910A", "910A"), ("Ascend910", "910A"),
        ("Ascend910ProB", "910A"), ("H100", None), ("Ascend310", None),
    ],
)  # fmt: skip
def test_families(name, expected):
    assert family(name) == expected


def test_a_chip_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(OptionError, match=r"(?s)no chip is called 'Ascend911'.*Ascend910B3"):
        Options(target="npu", soc="Ascend911")


def test_without_a_chip_a_plan_needs_torch_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(TargetError, match="torch_npu"):
        explain(norm, torch.ones(2, 64), torch.ones(64), options={"target": "npu"})


def test_torch_npu_is_not_imported_for_a_plan():
    code = (
        "import sys, torch, npu_fuse\n"
        "sys.modules['torch_npu'] = None\n"
        "options = {'target': 'npu', 'soc': 'Ascend910B3'}\n"
        "r = npu_fuse.explain(torch.nn.RMSNorm(64), torch.ones(2, 64), options=options)\n"
        "g, = r.graphs; print(g.target, g.soc, g.handoff, [str(s.status) for s in g.sites])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "npu Ascend910B3 npugraph_ex ['fused']"


NORMS = [(soc, F16, F16, True) for soc in EXAMPLES] + [
    (A2, BF16, BF16, True), (A3, BF16, F32, True), (A5, BF16, BF16, True), (P310, BF16, BF16, False),
    (A910, BF16, BF16, False), (A2, F16, F32, True),
]  # fmt: skip


@pytest.mark.parametrize(("soc", "dtype", "gamma", "fused"), NORMS)
def test_norms(soc, dtype, gamma, fused):
    op, status, reason = only(norm, torch.randn(3, 64, dtype=dtype), torch.randn(64, dtype=gamma), soc=soc)
    assert op == "rms_norm"
    assert status is (Status.FUSED if fused else Status.REFUSED_BY_TARGET)
    assert fused or (str(dtype)[6:] in reason and soc in reason and "document" in reason)


def rounded(x, w):
    wide = x.float()
    return (w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def test_an_old_chip_gets_gamma_in_the_dtype_of_x():
    """float16 x with float32 gamma is no pair of its kernel: the form in float32 is taken, not the mixed one."""
    x, w = torch.randn(3, 64, dtype=F16), torch.randn(64)
    taken = {}
    for soc in (A2, P310):
        report = explain(rounded, x, w, options={"target": "npu", "soc": soc})
        (site,) = report.graphs[0].sites
        assert site.status is Status.FUSED
        taken[soc] = site.after.ops
    assert taken[P310] > taken[A2]  # casts


def test_an_old_chip_wants_32_bytes():
    op, status, reason = only(norm, torch.randn(3, 8, dtype=F16), torch.randn(8, dtype=F16), soc=P310)
    assert (op, status) == ("rms_norm", Status.FUSED)  # in float32 a row has 32 bytes
    _, status, reason = only(norm, torch.randn(3, 4, dtype=F16), torch.randn(4, dtype=F16), soc=P310)
    assert status is Status.REFUSED_BY_TARGET and "32 bytes" in reason and "document" in reason


ROTATIONS = [
    (rope, rotated(64), A2, ""), (rope, rotated(128), P310, ""), (rope, rotated(64), P310, "width of 128"),
    (rope, rotated(128, batch=2), P310, "one dimension"), (rope, rotated(128, shape=(33, 32, 8)), P310, "1024"),
    (rope, rotated(128, BF16), P310, "bfloat16"), (pairs, paired(128), A2, ""), (pairs, paired(128), P310, "'half'"),
    (rope, rotated(128), A910, ""), (rope, rotated(898), A2, "896"), (rope, rotated(128, batch=2), A5, ""),
]  # fmt: skip


@pytest.mark.parametrize(("turn", "args", "soc", "refused"), ROTATIONS)
def test_rotations(turn, args, soc, refused):
    op, status, reason = only(turn, *args, soc=soc)
    assert op == "rotary_mul"
    assert status is (Status.REFUSED_BY_TARGET if refused else Status.FUSED), reason
    assert refused in reason and (not refused or "document" in reason)


def test_what_the_tilings_refuse_goes_in_the_other_way_round():
    """Many heads beside a short sequence: [B, N, S, D] is refused by the kernel, [B, S, N, D] is not."""
    assert only(rope, *rotated(64, shape=(3, 6, 2)))[1] is Status.FUSED
    assert only(rope, *rotated(24, shape=(3, 6, 40)))[1] is Status.FUSED


@pytest.mark.parametrize(("soc", "fused"), [(A2, True), (A3, True), (A5, True), (P310, True), (A910, False)])
def test_gates(soc, fused):
    _, status, reason = only(swiglu, torch.randn(3, 64, dtype=F16), soc=soc)
    assert status is (Status.FUSED if fused else Status.REFUSED_BY_TARGET)
    assert fused or "npu_swiglu has no kernel on Ascend910A" in reason


def clamped(x):
    a, b = x.chunk(2, -1)
    a, b = a.clamp(max=7.0), b.clamp(-7.0, 7.0)
    return (b + 1) * (a * torch.sigmoid(a * 1.702))


@pytest.mark.parametrize(("soc", "fused"), [(A2, True), (A3, True), (A5, False), (P310, False)])
def test_clamped_gates(soc, fused):
    _, status, reason = only(clamped, torch.randn(3, 64, dtype=F16), soc=soc)
    assert status is (Status.FUSED if fused else Status.REFUSED_BY_TARGET), reason


def experts(x, w, ends):
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=ends)


@pytest.mark.parametrize(
    ("soc", "dtype", "train", "refused"),
    [
        (A2, BF16, True, ""), (P310, BF16, False, "bfloat16"), (A910, F16, False, "no kernel"),
        (P310, F16, True, "splits rows only"), (P310, F16, False, ""),
    ],
)  # fmt: skip
def test_grouped_matmuls(soc, dtype, train, refused):
    pytest.importorskip("transformers.integrations.moe")
    x, w = torch.randn(24, 32, dtype=dtype), torch.randn(4, 32, 16, dtype=dtype)
    x.requires_grad_(train)
    ends = torch.tensor([3, 3, 11, 24], dtype=torch.int32)
    _, status, reason = only(experts, x, w, ends, soc=soc, train=train)
    assert status is (Status.REFUSED_BY_TARGET if refused else Status.FUSED), reason
    assert refused in reason


def test_every_op_of_the_table_names_its_source():
    assert all("document" in support.source for support in SUPPORT.values())
    assert chip_limit("npu_swiglu", None, BF16) is None and chip_limit("npu_swiglu", "Ascend310P3", BF16)


def test_the_table_of_chips():
    arguments = ["chips", "qwen2", "--dtype", "float16", "--soc", "Ascend910B3", "--soc", "Ascend310P3"]
    made = CliRunner().invoke(main, [*arguments, "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.output[made.output.index("{") :])["qwen2"]
    assert found["Ascend910B3"]["rotary_mul"] == {"fused": 4, "refused_by_target": 0, "other": 0, "reasons": []}
    assert found["Ascend310P3"]["rotary_mul"]["refused_by_target"] == 4
    assert "128" in found["Ascend310P3"]["rotary_mul"]["reasons"][0]


def test_cells_tell_refusals_apart():
    cells = [chip_table.Coverage(5, 0, 0, ()), chip_table.Coverage(3, 0, 2, ()), chip_table.Coverage(0, 4, 1, ())]
    assert [c.text for c in cells] == ["5", "3 of 5", "0 of 5 (4 refused)"]
    assert chip_table.lines(["a", "bb"], [["1", "2"]]) == ["a  bb", "1  2"]
