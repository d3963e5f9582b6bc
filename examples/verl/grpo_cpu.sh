#!/usr/bin/env bash
# A whole GRPO loop on a CPU: FSDP2 actor and reference, vLLM rollout with weight sync, reward by rule.
# FOLDER holds model/, train.parquet and reward.py (tests/real_verl/loop_files.py makes them); tests/real_verl and
# tests/real_verl/plugin are on PYTHONPATH, with a platform for CPUs and what verl and vLLM need from outside to run on
# one. SWITCH=False is without npu_fuse. Further overrides go at the end.
set -euo pipefail

export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=cpu_platform VERL_ENGINE_DEVICE=npu VERL_ENGINE_VENDOR=huawei
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 RAY_USAGE_STATS_ENABLED=0
export VLLM_CPU_KVCACHE_SPACE=1

# A failed weight receiver leaves verl waiting: give the run an end.
timeout "${LIMIT:-600}" python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="${FOLDER}/train.parquet" \
    data.val_files="${FOLDER}/train.parquet" \
    data.train_batch_size=4 \
    data.max_prompt_length=32 \
    data.max_response_length=16 \
    data.dataloader_num_workers=0 \
    actor_rollout_ref.model.path="${FOLDER}/model" \
    actor_rollout_ref.model.use_remove_padding=True \
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa \
    actor_rollout_ref.model.external_lib=[npu_fuse.integrations.verl,cpu_offload] \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.enable="${SWITCH:-True}" \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.handoff=aot_eager \
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.report_dir="${FOLDER}/npu_fuse" \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.optim.lr=1e-2 \
    actor_rollout_ref.actor.use_torch_compile=False \
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False \
    actor_rollout_ref.ref.fsdp_config.use_torch_compile=False \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.n=4 \
    actor_rollout_ref.rollout.enforce_eager=False \
    actor_rollout_ref.rollout.enable_chunked_prefill=True \
    actor_rollout_ref.rollout.max_model_len=128 \
    actor_rollout_ref.rollout.max_num_batched_tokens=512 \
    actor_rollout_ref.rollout.max_num_seqs=16 \
    actor_rollout_ref.rollout.free_cache_engine=False \
    +actor_rollout_ref.rollout.enable_sleep_mode=False \
    +actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config.mode=3 \
    actor_rollout_ref.rollout.agent.num_workers=1 \
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16 \
    reward.num_workers=1 \
    reward.custom_reward_function.path="${FOLDER}/reward.py" \
    trainer.device=cpu \
    trainer.logger=[console] \
    trainer.n_gpus_per_node=1 \
    trainer.val_before_train=False \
    trainer.total_training_steps="${STEPS:-16}" \
    trainer.total_epochs=1 \
    trainer.resume_mode=disable \
    trainer.default_local_dir="${FOLDER}/checkpoints" \
    hydra.run.dir="${FOLDER}/hydra" \
    ray_kwargs.ray_init.num_cpus=12 \
    +ray_kwargs.ray_init.resources.NPU=2 \
    +ray_kwargs.ray_init.include_dashboard=False \
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
    "$@"
