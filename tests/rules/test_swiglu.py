"""swiglu: every true respelling fuses once and stays within the bound; no near miss of a gate changes a result."""

from __future__ import annotations

import pytest

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
