#!/usr/bin/env bash
# PPO of a dense model below 7B on one Ascend node: actor, critic and reference with FSDP2, rollout in graph mode.
# MODEL, TRAIN and TEST name a model folder and two parquet files; further overrides go at the end.
set -euo pipefail

export TASK_QUEUE_ENABLE=2              # training
export VLLM_ASCEND_TASK_QUEUE_ENABLE=1  # rollout: level 2 excludes graph mode
export HCCL_OP_EXPANSION_MODE=AIV

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=gae \
    data.train_files="${TRAIN}" \
    data.val_files="${TEST}" \
    data.train_batch_size=512 \
    data.max_prompt_length=1024 \
    data.max_response_length=2048 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen3-4B}" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.external_lib=npu_fuse.integrations.verl \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.enable=True \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.report_dir=outputs/npu_fuse \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.fsdp_config.fsdp_size=-1 \
    actor_rollout_ref.actor.fsdp_config.reshard_after_forward=False \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=1 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.enable_chunked_prefill=True \
    actor_rollout_ref.rollout.enforce_eager=False \
    critic.strategy=fsdp2 \
    critic.model.path="${MODEL:-Qwen/Qwen3-4B}" \
    critic.model.use_remove_padding=True \
    critic.model.external_lib=npu_fuse.integrations.verl \
    +critic.model.fused_kernel_options.npu_fuse.enable=True \
    critic.fsdp.reshard_after_forward=False \
    critic.optim.lr=1e-5 \
    critic.use_dynamic_bsz=True \
    critic.ppo_max_token_len_per_gpu=32768 \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.logger=[console] \
    trainer.total_epochs=1 \
    "$@"
