"""Stock verl's whole GRPO loop on CPUs: Ray, FSDP2 actor and reference, vLLM rollout; npu_fuse off against on."""

from __future__ import annotations

import re

import grpo
import loop_files
import pytest

pytestmark = pytest.mark.real_grpo
STEPS = 16
ROLES = ("verl_actor", "verl_reference", "vllm_model")
SITES = {"qwen3": (14, 15), "qwen3_moe": (18, 21)}
"""Fused in a graph of every decoder block of actor and reference, two in all, and in the rollout's graphs."""


def train(folder, kind, switch, steps=STEPS, *overrides):
    loop_files.make(folder, kind)
    with grpo.started(
        folder, switch, steps, *grpo.ALIKE, *overrides, environment={"TORCH_LOGS": "recompiles"}
    ) as process:
        made = grpo.finish(folder, process)
    assert made.code == 0, made.output[-6000:]
    assert len(made.metrics) == steps
    return made


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_the_loop_learns_the_same(kind, tmp_path):
    off = train(tmp_path / "off", kind, False)
    on = train(tmp_path / "on", kind, True)
    assert not off.tables
    for role in ROLES:
        tables = [table for name, table in on.tables.items() if role in name]
        assert len(tables) == 1, on.tables.keys()
        assert tables[0]["totals"]["by_status"].get("fused", 0) > 0, role
    assert not recompiled_late(on.output)
    for run in (off, on):
        rewards = run.curve("critic/rewards/mean")
        assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.3, rewards


def recompiled_late(output):
    """What Dynamo compiled again in the trainer's workers after the second step."""
    late = re.split(r"step:2 - ", output, maxsplit=1)[-1]
    return [line for line in late.splitlines() if "WorkerDict" in line and "Recompiling function" in line]
