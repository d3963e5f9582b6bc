"""Many mutants from one seed, judged and counted: what the tests and bench/soundness.py run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from .judge import judge
from .strategies import Mutant, mutants


@dataclass
class Tally:
    """Counts by op; wrong results and faults with the mutant's text, so that each can be run again."""

    mutants: Counter[str] = field(default_factory=Counter)
    rewritten: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    discarded: int = 0
    wrong: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def campaign(number: int, count: int, op: str | None = None) -> Tally:
    """`count` mutants drawn with seed `number`."""
    tally = Tally()

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutants(op))
    def one(mutant: Mutant) -> None:
        verdict = judge(mutant)
        tally.mutants[mutant.op] += 1
        tally.rewritten[mutant.op] += bool(verdict.fused)
        tally.calls += verdict.calls
        tally.discarded += bool(verdict.discarded)
        if verdict.wrong:
            tally.wrong.append(f"{verdict.wrong} (fused: {', '.join(verdict.fused) or 'nothing'})\n{mutant}")
        if verdict.faults:
            tally.faults.append(f"{'; '.join(verdict.faults)}\n{mutant}")

    one()
    return tally
