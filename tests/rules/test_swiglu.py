"""swiglu: every true respelling fuses once and stays within the bound; no near miss of a gate changes a result."""

from __future__ import annotations

import pytest
import torch

from . import near, parts_gates
from .helpers import MODES, NEAR_MODES, assert_one_fused, modes_of, through_torch_compile
from .near_gates import GUARDED, NEAR_MISSES

SPELLINGS = parts_gates.swiglu(112)


@pytest.mark.parametrize("index", range(len(SPELLINGS)), ids=[p.name for p in SPELLINGS])
def test_respelling_fuses(index):
    for mode in modes_of(index, named=index < 20):
        reports = through_torch_compile(SPELLINGS[index], mode, parts_gates.inputs(mode.dtype))
        assert_one_fused(reports, {"swiglu"})


@pytest.mark.parametrize("miss", (*NEAR_MISSES, *GUARDED), ids=str)
@pytest.mark.parametrize("mode", NEAR_MODES, ids=str)
def test_near_miss_of_any_gate_changes_nothing(miss, mode):
    near.check(miss, mode, parts_gates.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("miss", (*NEAR_MISSES, *GUARDED), ids=str)
@pytest.mark.parametrize("mode", [m for m in MODES if m not in NEAR_MODES], ids=str)
def test_near_miss_of_any_gate_changes_nothing_in_the_other_modes(miss, mode):
    near.check(miss, mode, parts_gates.inputs)


@pytest.mark.parametrize("op", ["npu_swiglu", "clipped_swiglu"])
def test_second_derivatives_of_large_gates_keep_their_digits(op):
    """1 - sigmoid(12) is 6e-6 in float32, to two digits."""

    def second(dtype):
        x = torch.cat((torch.linspace(9, 14, 6), torch.linspace(-1, 1, 6))).to(dtype).unsqueeze(0).requires_grad_()
        settings = (-1,) if op == "npu_swiglu" else (1.0, 1e3, 0.0, False)
        y = getattr(torch.ops.npu_fuse, op)(x, *settings)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(dx[:, :6].sum(), x)[0][:, :6]

    torch.testing.assert_close(second(torch.float32).double(), second(torch.float64), rtol=1e-5, atol=0.0)
