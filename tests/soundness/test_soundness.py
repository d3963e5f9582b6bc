"""500 mutants of the rules, in ten seeds: no wrong value, no wrong gradient, no crash, no fault inside.

`bench/soundness.py` runs 10,000.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from npu_fuse import proofs
from npu_fuse.prove import Verdict

from .campaign import campaign

SEEDS, EACH = range(10), 50


@pytest.mark.parametrize("number", SEEDS)
def test_no_mutant_changes_a_result(number):
    tally = campaign(number, EACH)
    assert tally.mutants.total() == EACH
    assert not tally.wrong, "\n\n".join(tally.wrong)
    assert not tally.faults, "\n\n".join(tally.faults)
    assert tally.discarded <= EACH // 10
    assert tally.rewritten.total() >= EACH // 4, "mutants that nothing rewrites test nothing"


def test_the_judge_sees_what_the_proof_would_have_refused(monkeypatch):
    """Without proofs some mutants come out wrong: the judge can fail."""
    monkeypatch.setattr(proofs, "prove", lambda site, form, *rest: replace(Verdict(True), form=form.name))
    proofs.forget_verdicts()
    try:
        assert campaign(1, 40, "rms_norm").wrong
    finally:
        proofs.forget_verdicts()
