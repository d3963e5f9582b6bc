"""`npu-fuse doctor --verl`: rows of the tuning guide for runs that get them right, wrong and contradicting."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from npu_fuse.cli import main
from npu_fuse.errors import OptionError
from npu_fuse.integrations.verl import settings_of
from npu_fuse.integrations.verl_config import read_run
from npu_fuse.integrations.verl_doctor import verl_doctor

A, R, M = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
RECIPES = Path(__file__).parents[1] / "examples" / "verl"
SWITCH = f"{M}.external_lib=npu_fuse.integrations.verl +{M}.fused_kernel_options.npu_fuse.enable=True"


def levels(source):
    return {f.code.removeprefix("verl."): f.level for f in verl_doctor(source)}


def test_a_good_run_has_nothing_to_mend():
    run = (
        f"export TASK_QUEUE_ENABLE=2 VLLM_ASCEND_TASK_QUEUE_ENABLE=1 HCCL_OP_EXPANSION_MODE=AIV\n"
        f"{SWITCH} {M}.path=Qwen/Qwen3-4B {A}.strategy=fsdp2 {A}.fsdp_config.reshard_after_forward=False"
    )
    assert set(levels(run).values()) == {"ok"}


@pytest.mark.parametrize(
    ("run", "code", "level"),
    [
        (f"{M}.path=x {A}.strategy=fsdp2", "switch", "warning"),
        (f"{SWITCH} {M}.fused_kernel_options.npu_fuse.numerisc=exact", "options", "error"),
        (SWITCH, "strategy", "error"),
        (f"{A}.strategy=fsdp2 {M}.path=Qwen/Qwen3-4B", "reshard", "warning"),
        (
            f"{A}.strategy=fsdp2 {M}.path=Qwen/Qwen3-32B {A}.fsdp_config.reshard_after_forward=False",
            "reshard",
            "warning",
        ),
        (f"{A}.fsdp_config.fsdp_size=3 trainer.n_gpus_per_node=8", "fsdp_size", "error"),
        (f"export TASK_QUEUE_ENABLE=2\n{A}.strategy=fsdp2", "task_queue", "error"),
        (f"{R}.enforce_eager=True", "graph_mode", "warning"),
        (f"{R}.enable_chunked_prefill=False", "chunked_prefill", "warning"),
        (f"+{R}.engine_kwargs.vllm.compilation_config.cudagraph_mode=FULL", "capture", "info"),
        (f"export HCCL_OP_EXPANSION_MODE=AVI\n{A}.strategy=fsdp2", "hccl", "error"),
        (f"{A}.strategy=megatron", "use_flash_attn", "warning"),
        (f"+{A}.megatron.override_transformer_config.use_flash_attn=False", "use_flash_attn", "error"),
        (f"{A}.megatron.context_parallel_size=2", "context_parallel", "error"),
        (f"{A}.megatron.sequence_parallel=False", "sequence_parallel", "warning"),
        (f"{A}.megatron.expert_model_parallel_size=8", "etp", "warning"),
        (f"{A}.megatron.tensor_model_parallel_size=4", "mc2", "info"),
    ],
)
def test_each_row(run, code, level):
    assert levels(run)[code] == level


def test_a_script_with_variables_and_a_yaml_file(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(
        f"export TASK_QUEUE_ENABLE=1  # a comment\nsize=4\npython -m verl.trainer.main_ppo \\\n"
        f'    {A}.fsdp_config.fsdp_size=${{size}} \\\n    {M}.path=${{MODEL_PATH}} \\\n    trainer.nnodes=2 "$@"\n'
    )
    config = read_run(str(script))
    assert config.values == {f"{A}.fsdp_config.fsdp_size": "4", "trainer.nnodes": "2"}
    assert config.environment == {"TASK_QUEUE_ENABLE": "1"}
    tree = tmp_path / "run.yaml"
    tree.write_text("actor_rollout_ref: {actor: {strategy: fsdp2, fsdp_config: {fsdp_size: -1}}}")
    assert read_run(str(tree)).get(f"{A}.strategy") == "fsdp2"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*_ascend.sh")), ids=lambda path: path.stem)
def test_the_recipes_leave_nothing_to_mend(recipe):
    assert set(levels(str(recipe)).values()) == {"ok"}


def test_a_critic_has_its_own_switch():
    run = f"{SWITCH} {A}.strategy=fsdp2 critic.strategy=fsdp2"
    assert levels(run)["critic"] == "warning"
    assert "critic" not in levels(f"{run} +critic.model.fused_kernel_options.npu_fuse.enable=True")


def test_the_rollout_is_under_the_same_switch():
    on = f"{SWITCH} {A}.strategy=fsdp2"
    assert levels(on)["rollout"] == "ok"
    assert levels(f"{on} +{M}.fused_kernel_options.npu_fuse.rollout=False")["rollout"] == "info"
    assert levels(f"export NPU_FUSE_VLLM=1\n{A}.strategy=fsdp2")["rollout"] == "ok"
    assert levels(f"{A}.strategy=fsdp2")["rollout"] == "info"


def test_the_command(tmp_path):
    told = CliRunner().invoke(main, ["doctor", "--verl", SWITCH])
    assert told.exit_code == 1 and "use_orig_params=True" in told.output
    told = CliRunner().invoke(main, ["doctor", "--verl", str(tmp_path / "missing.sh")])
    assert told.exit_code == 2


def test_settings():
    assert settings_of({}) is None
    assert settings_of({"npu_fuse": {"enable": False}}) is None
    made = settings_of({"npu_fuse": {"enable": True, "strict": True}})
    assert made is not None and made.options.strict and made.verl_patches == "off"
    with pytest.raises(OptionError, match="verl_patches"):
        settings_of({"npu_fuse": {"enable": True, "verl_patches": "on"}})
