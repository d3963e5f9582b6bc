"""Figures of `npu-fuse agree` from log-probabilities that are known."""

from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from npu_fuse.cli import main
from npu_fuse.integrations.agreement import compare


def test_equal_log_probabilities_have_no_divergence():
    found = compare("plain", "fused", [-1.0, -2.5], [-1.0, -2.5])
    assert (found.tokens, found.largest, found.mean, found.kl) == (2, 0.0, 0.0, 0.0)


def test_the_divergence_is_estimated_without_bias():
    """Over all words weighted by the rollout's probabilities, the estimate is KL(rollout || actor) itself."""
    actor, rollout = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    counts = [1, 1, 2]  # a sample of four in the rollout's proportions
    first = [math.log(p) for p, n in zip(actor, counts, strict=True) for _ in range(n)]
    second = [math.log(p) for p, n in zip(rollout, counts, strict=True) for _ in range(n)]
    exact = sum(q * math.log(q / p) for p, q in zip(actor, rollout, strict=True))
    found = compare("plain", "plain", first, second)
    assert found.kl == pytest.approx(exact)
    assert found.largest == pytest.approx(math.log(2)) and found.mean == pytest.approx(0.75 * math.log(2))


def test_a_wrong_option_ends_with_code_two():
    told = CliRunner().invoke(main, ["agree", "llama", "--numerics", "exactly"])
    assert told.exit_code == 2 and "exact" in told.output
