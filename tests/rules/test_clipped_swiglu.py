"""clipped_swiglu: every true respelling fuses once and stays within the bound."""

from __future__ import annotations

import pytest

from . import parts_gates
from .helpers import assert_one_fused, modes_of, through_torch_compile

SPELLINGS = parts_gates.clipped_swiglu(112)


@pytest.mark.parametrize("index", range(len(SPELLINGS)), ids=[p.name for p in SPELLINGS])
def test_respelling_fuses(index):
    for mode in modes_of(index, named=index < 20):
        reports = through_torch_compile(SPELLINGS[index], mode, parts_gates.inputs(mode.dtype))
        assert_one_fused(reports, {"clipped_swiglu"})
