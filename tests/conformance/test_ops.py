"""Schemas, meta kernels, golden results and gradients of every op that npu_fuse emits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_fuse.device_cases import CASES, COMMUNICATING, Case
from npu_fuse.device_checks import npu, on, several
from npu_fuse.device_checks import reference as ours

pytestmark = pytest.mark.real_wheel

ROOT = Path(__file__).resolve().parents[2]


def pairs() -> Any:
    return pytest.mark.parametrize(
        ("case", "dtype"), [pytest.param(c, t, id=f"{c}-{str(t)[6:]}") for c in CASES for t in c.dtypes]
    )


def test_the_table_has_every_op_that_a_pass_emits() -> None:
    import npu_fuse.passes  # noqa: F401

    text = "".join(path.read_text() for folder in ("passes", "npu_fuse") for path in (ROOT / folder).glob("*.py"))
    emitted = set(re.findall(r'(?:fused|emit_with)\(\s*"(npu_\w+)"', text))
    on_wheel = {name for name in emitted if hasattr(torch.ops.npu, name)}
    assert on_wheel == {case.op for case in CASES}
    assert emitted - on_wheel == {"npu_add_rms_norm_unrounded"}  # for the proof only
    assert set(re.findall(r"torch\.ops\.npu\.(npu_(?:mm_|all_gather_)\w+)\.default", text)) == set(COMMUNICATING)


THEIRS = {"npu_rotary_mul_backward", "npu_moe_token_permute_grad_v2", "npu_moe_token_unpermute_grad_v2"}
NAMES = sorted({case.op for case in CASES} | set(COMMUNICATING) | {c.backward for c in CASES if c.backward} - THEIRS)


@pytest.mark.parametrize("name", NAMES)
def test_schema(name: str) -> None:
    """Arguments in order, types, defaults, results. Names of tensors differ between releases."""

    def told(op: Any) -> Any:
        schema = op._schema
        arguments = [
            (str(a.type), a.kwarg_only, a.has_default_value() and a.default_value, str(a.type) == "Tensor" or a.name)
            for a in schema.arguments
        ]
        return arguments, [str(r.type) for r in schema.returns]

    assert told(ours(name)) == told(npu(name))


@pairs()
def test_meta_kernel_and_device_agree(case: Case, dtype: torch.dtype) -> None:
    args, named = case.make(dtype)
    kinds = [
        [(t.shape, t.dtype, t.stride()) for t in several(op(*on(device, args), **on(device, named)))]
        for op, device in (
            (npu(case.op), "meta"),
            (npu(case.op), "npu"),
            (ours(case.op), "meta"),
            (ours(case.op), "cpu"),
        )
    ]
    assert kinds[0] == kinds[1] == kinds[2] == kinds[3]


@pytest.mark.parametrize("case", [c for c in CASES if not c.label], ids=str)
def test_permuted_input(case: Case) -> None:
    """Where the meta kernel promises strides that the device does not give, npu_fuse makes the input dense."""
    args, named = case.make(torch.float32)
    turned = [a.transpose(0, 1).contiguous().transpose(0, 1) if getattr(a, "ndim", 1) > 1 else a for a in args]
    promised = several(npu(case.op)(*on("meta", turned), **named))[0]
    given = several(npu(case.op)(*on("npu", turned), **named))[0]
    assert given.is_contiguous()
    assert promised.is_contiguous() != case.keeps_strides


@pairs()
def test_golden(case: Case, dtype: torch.dtype) -> None:
    """The stand-in's kernel, the reference target and float64 give the same to a rounding of the result."""
    args, named = case.make(dtype)
    device = several(npu(case.op)(*on("npu", args), **on("npu", named)))
    reference = several(ours(case.op)(*args, **named))
    exact = several(ours(case.op)(*on("cpu", args, torch.float64), **named))
    # add_rms_norm rounds the sum, the quotient and the product to x's dtype; its statistics follow the rounded sum.
    rounds = 3 * torch.finfo(dtype).eps if case.op == "npu_add_rms_norm" else 0.0
    for i, (given, same, true) in enumerate(zip(device, reference, exact, strict=True)):
        if i in case.unwritten:
            continue
        relative = rounds or (torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0)
        close(given.cpu(), true, relative)
        close(given.cpu(), same.double(), relative)


def close(given: torch.Tensor, true: torch.Tensor, relative: float) -> None:
    """To `relative`, and to sixteen roundings of float32 of the largest value: terms of a rotation cancel."""
    if not given.is_floating_point():
        assert torch.equal(given.long(), true.long())
        return
    assert not given.isnan().any()
    inner = 16 * torch.finfo(torch.float32).eps * true.abs().max().item()
    torch.testing.assert_close(given.double(), true.double(), rtol=relative, atol=inner)


@pytest.mark.parametrize("mode", ["row", "merge"])
def test_both_tilings_of_add_rms_norm(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof takes both: which sum the kernel normalises depends on its tiling."""
    monkeypatch.setenv("NPU_HOST_ADD_RMS_NORM", mode)
    args, _ = next(c for c in CASES if c.op == "npu_add_rms_norm").make(torch.bfloat16)
    name = "npu_add_rms_norm_unrounded" if mode == "row" else "npu_add_rms_norm"
    other = "npu_add_rms_norm" if mode == "row" else "npu_add_rms_norm_unrounded"
    given = npu("npu_add_rms_norm")(*on("npu", args))[0].cpu()
    differing = (given != ours(name)(*args)[0]).float().mean().item()
    assert differing < 0.01 < (given != ours(other)(*args)[0]).float().mean().item()


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, t, id=f"{c}-{str(t)[6:]}") for c in CASES if c.backward for t in c.dtypes]
)
def test_the_wheels_autograd_formula(case: Case, dtype: torch.dtype) -> None:
    import npu_host_ops

    args, named = case.make(dtype)
    device, exact = on("npu", args), on("cpu", args, torch.float64)
    for i in case.differentiable:
        device[i].requires_grad_()
        exact[i].requires_grad_()
    given, true = (several(op(*a, **named))[0] for op, a in ((npu(case.op), device), (ours(case.op), exact)))
    weights = torch.randn_like(true)
    npu_host_ops.reset_counts()
    given.backward(weights.to("npu", dtype))
    true.backward(weights.to(dtype).double())
    assert npu_host_ops.counts()[f"npu::{case.backward}"].launches == 1
    for i in case.differentiable:
        got, want = device[i].grad, exact[i].grad
        assert got.dtype == device[i].dtype and got.shape == want.shape
        scale = want.abs().max().item()
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=4 * torch.finfo(got.dtype).eps * scale)


def test_what_has_no_gradient_says_so_or_loses_it() -> None:
    """The two kinds that npu_fuse must never leave to the wheel's autograd."""
    args, _ = next(c for c in CASES if c.op == "npu_add_rms_norm").make(torch.float32)
    x1, x2, gamma, epsilon = on("npu", args)
    with pytest.raises(RuntimeError, match="not implemented"):
        npu("npu_add_rms_norm")(x1.requires_grad_(), x2, gamma, epsilon)[0].sum().backward()
    args, named = next(c for c in CASES if c.op == "npu_clipped_swiglu").make(torch.float32)
    x = args[0].to("npu").requires_grad_()
    npu("npu_clipped_swiglu")(x, **named).sum().backward()
    assert x.grad is None or not x.grad.any()  # a warning at best


def test_geglu_cannot_be_traced_for_training() -> None:
    args, _ = next(c for c in CASES if c.op == "npu_geglu").make(torch.float32)
    x, y = args[0].to("meta"), args[0][..., :48].to("meta")
    with pytest.raises(TypeError):
        torch.ops.npu.npu_geglu_grad(y, x, y)


def test_gradients_of_tables_stay_unwritten_in_a_traced_graph() -> None:
    """Why the target refuses rotations whose cos or sin needs a gradient."""
    args, _ = next(c for c in CASES if c.label == "BNSD_11SD").make(torch.float32)
    x, cos, sin, mode = on("npu", args)
    dy = torch.ones_like(x)
    assert torch.ops.npu.npu_rotary_mul_backward(dy, x, cos, sin, mode)[1].isnan().all()
    assert not torch.ops.npu.npu_rotary_mul_backward(dy, x, cos.requires_grad_(), sin, mode)[1].isnan().any()
