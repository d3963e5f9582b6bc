"""Stock verl's whole GRPO loop on CPUs: Ray, FSDP2 actor and reference, vLLM rollout; npu_fuse off against on."""

from __future__ import annotations

import grpo
import loop_files
import pytest

pytestmark = pytest.mark.real_grpo
STEPS = 16
ROLES = ("verl_actor", "verl_reference", "vllm_model")
BOUND = 64 * 2.0**-23
"""In units of float32's step, of means over some hundred tokens: relative to the largest of the curve."""
CURVES = ("critic/rewards/mean", "actor/loss", "actor/kl_loss", "actor/grad_norm", "actor/entropy")


def train(folder, kind, switch):
    loop_files.make(folder, kind)
    with grpo.started(folder, switch, STEPS, *grpo.ALIKE, environment={"TORCH_LOGS": "recompiles"}) as process:
        made = grpo.finish(folder, process)
    assert made.code == 0, made.output[-6000:]
    assert len(made.metrics) == STEPS
    return made


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_the_loop_learns_the_same(kind, tmp_path):
    off = train(tmp_path / "off", kind, False)
    on = train(tmp_path / "on", kind, True)
    assert off.tables == {}
    for role in ROLES:
        fused = [table["totals"]["by_status"]["fused"] for name, table in on.tables.items() if role in name]
        assert len(fused) == 1 and fused[0] > 0, (role, on.tables.keys())
    assert recompiled(on.output, "step:2 - ") == []
    for run in (off, on):
        rewards = run.curve("critic/rewards/mean")
        assert sum(rewards[-4:]) > sum(rewards[:4]) + 2, rewards
        # Both sides in float32: what the rollout sampled is what the trainer finds.
        assert max(run.curve("training/rollout_probs_diff_max")) < 1e-5
    for name in CURVES:
        one, other = on.curve(name), off.curve(name)
        assert one == pytest.approx(other, rel=0, abs=BOUND * max(map(abs, other))), name


def recompiled(output, since):
    """What Dynamo compiled again in the trainer's workers behind this text."""
    _, _, late = output.partition(since)
    return [line for line in late.splitlines() if "WorkerDict" in line and "Recompiling function" in line]
