"""RMSNorm: every true respelling fuses once and stays within the bound; no near miss changes a result."""

from __future__ import annotations

import pytest

from . import near, parts_rms_norm
from .helpers import MODES, NEAR_MODES, assert_one_fused, modes_of, through_torch_compile
from .near_rms_norm import GUARDED, NEAR_MISSES

SPELLINGS = (*parts_rms_norm.NAMED, *parts_rms_norm.combined(96))
COMPOSED = {"rms_norm", "add_rms_norm"}
"""In inference the sum before a norm may join it."""


@pytest.mark.parametrize("index", range(len(SPELLINGS)), ids=[p.name for p in SPELLINGS])
def test_respelling_fuses(index):
    spelling = SPELLINGS[index]
    for mode in modes_of(index, spelling in parts_rms_norm.NAMED):
        reports = through_torch_compile(spelling, mode, parts_rms_norm.inputs(mode.dtype))
        assert_one_fused(reports, COMPOSED)


@pytest.mark.parametrize("miss", (*NEAR_MISSES, *GUARDED), ids=str)
@pytest.mark.parametrize("mode", NEAR_MODES, ids=str)
def test_near_miss_changes_nothing(miss, mode):
    near.check(miss, mode, parts_rms_norm.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("miss", (*NEAR_MISSES, *GUARDED), ids=str)
@pytest.mark.parametrize("mode", [m for m in MODES if m not in NEAR_MODES], ids=str)
def test_near_miss_changes_nothing_in_the_other_modes(miss, mode):
    near.check(miss, mode, parts_rms_norm.inputs)
