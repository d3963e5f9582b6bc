#!/usr/bin/env bash
# GRPO of an MoE model on two Ascend nodes, with FSDP2 and a vLLM rollout in graph mode.
# MODEL, TRAIN and TEST name a model folder and two parquet files; further overrides go at the end.
set -euo pipefail

export TASK_QUEUE_ENABLE=2              # training
export VLLM_ASCEND_TASK_QUEUE_ENABLE=1  # rollout: level 2 excludes graph mode
export HCCL_OP_EXPANSION_MODE=AIV         # AI_CPU if the rollout hangs while it captures with expert parallelism

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="${TRAIN}" \
    data.val_files="${TEST}" \
    data.train_batch_size=512 \
    data.max_prompt_length=1024 \
    data.max_response_length=2048 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen3-30B-A3B}" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.external_lib=npu_fuse.integrations.verl \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.enable=True \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.report_dir=outputs/npu_fuse \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.fsdp_config.fsdp_size=16 \
    actor_rollout_ref.actor.fsdp_config.reshard_after_forward=True \
    actor_rollout_ref.actor.fsdp_config.param_offload=True \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.enable_chunked_prefill=True \
    actor_rollout_ref.rollout.enforce_eager=False \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=2 \
    trainer.logger=[console] \
    trainer.total_epochs=1 \
    "$@"
