"""One rank of a real verl FSDP actor: some optimizer steps on seeded data, results as one torch file.

Run as a program with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

import argparse
import json
import os
import signal
import types
from functools import partial

import torch

LENGTHS = ((7, 12, 5, 9), (3, 14, 8, 6), (11, 4, 10, 13))
"""Another number of tokens in every step, and in every micro-batch."""


def batch(step, rank, vocabulary, lengths=None):
    from tensordict import TensorDict

    generator = torch.Generator().manual_seed(1000 * step + rank)
    lengths = lengths or LENGTHS[step % len(LENGTHS)]
    ids = [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
    jagged = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    return TensorDict(
        {
            "input_ids": jagged(ids),
            "position_ids": jagged([torch.arange(n) for n in lengths]),
            "loss_mask": jagged([torch.ones(n) for n in lengths]),
        },
        batch_size=len(lengths),
    )


def make_engine(given):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model = HFModelConfig(
        path=given.model, load_tokenizer=False, use_remove_padding=True, external_lib="npu_fuse.integrations.verl",
        override_config={"attn_implementation": "sdpa"}, enable_gradient_checkpointing=not given.no_checkpointing,
        lora_rank=given.lora, fused_kernel_options=json.loads(given.fused),
    )  # fmt: skip
    engine = FSDPEngineConfig(
        strategy=given.strategy, use_dynamic_bsz=False, micro_batch_size_per_gpu=given.micro, use_torch_compile=False,
        use_orig_params=not given.flat, ulysses_sequence_parallel_size=given.ulysses, forward_only=given.forward_only,
        mixed_precision={"param_dtype": given.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        reshard_after_forward=not given.keep_unsharded,
    )  # fmt: skip
    # Adam moves by a gradient over its own size: where a gradient is zero but for rounding (the softmax cancels a bias
    # of keys in what is not rotated), the step would be of full length and of rounding alone. This eps is above the
    # rounding of gradients clipped to a norm of 1, and far below what the rest of them are.
    optimizer = FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, override_optimizer_config={"eps": 1e-5})
    return EngineRegistry.new(
        model_type="language_model", backend=given.strategy, model_config=model, engine_config=engine,
        optimizer_config=optimizer, checkpoint_config=CheckpointConfig(),
    )  # fmt: skip


def trained(engine):
    """This rank's share of what the optimizer moves."""
    from torch.distributed.tensor import DTensor

    values = [p.detach() for p in engine.module.parameters() if p.requires_grad]
    return [(v.to_local() if isinstance(v, DTensor) else v).double() for v in values]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while(doing):
    """Let this process be killed in the middle of writing a proof, or of compiling a kernel."""
    if doing == "proof":
        from npu_fuse import proof_cache

        def half(data, file):
            file.write(json.dumps(data)[:20])
            file.flush()
            die()

        proof_cache.json = types.SimpleNamespace(loads=json.loads, dump=half)
    elif doing == "compile":
        from torch._inductor.cpp_builder import CppBuilder

        CppBuilder.build = die


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--fused", default="{}", help="fused_kernel_options as JSON")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro", type=int, default=2, help="sequences in a micro-batch")
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--save", help="a folder for verl's own checkpoint after the last step")
    parser.add_argument("--resume", help="a folder of such a checkpoint")
    parser.add_argument("--die", choices=("proof", "compile", "step"), help="let the last rank be killed in the middle")
    for flag in ("no-checkpointing", "flat", "forward-only", "keep-unsharded"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args()

    import verl.utils.tensordict_utils as tu
    from verl.workers.utils.losses import sft_loss

    from npu_fuse.report import Status

    torch.distributed.init_process_group("gloo")
    rank, dies = torch.distributed.get_rank(), None
    if rank == torch.distributed.get_world_size() - 1:
        dies = given.die
    die_while(dies)
    torch.manual_seed(0)
    engine = make_engine(given)
    if given.strategy == "fsdp":
        import torch.distributed.fsdp._init_utils as init_utils
        from verl.workers.engine.fsdp import transformer_impl

        # verl asks for the device "cpu:cpu"; nothing has to move on a CPU.
        transformer_impl.load_fsdp_model_to_gpu = transformer_impl.offload_fsdp_model_to_cpu = lambda *_: None
        init_utils._check_module_states_for_sync_module_states = lambda *_: None
    engine.initialize()
    if given.resume:
        engine.load_checkpoint(given.resume)
    vocabulary = engine.model_config.hf_config.vocab_size
    losses, norms, before = [], [], trained(engine)
    for step in range(given.steps):
        data = batch(step, rank // given.ulysses, vocabulary)
        tu.assign_non_tensor(
            data, temperature=1.0, use_remove_padding=True, use_dynamic_bsz=False, micro_batch_size_per_gpu=given.micro,
            use_fused_kernels=False, calculate_entropy=False, global_batch_size=4 * engine.get_data_parallel_size(),
        )  # fmt: skip
        with engine.train_mode():
            loss = die if dies == "step" and step == 2 else partial(sft_loss, config=None)
            made = engine.train_batch(data, loss)
        if rank == 0:  # verl gives metrics to one rank of a sequence-parallel group
            losses.append(made["loss"] if "loss" in made else made["metrics"].get("loss"))
            norms.append(float(made["metrics"]["grad_norm"]))
    moved = sum(((one - other) ** 2).sum() for one, other in zip(trained(engine), before, strict=True))
    torch.distributed.all_reduce(moved)
    if given.save:
        engine.save_checkpoint(given.save, global_step=given.steps)
    weights = {name: value for name, value in engine.get_per_tensor_param()[0]}
    weights = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in weights.items()}
    names = [name for name, _ in engine.module.named_parameters()]
    state = list(engine.module.state_dict())  # FSDP1 gathers for it: on every rank
    entries = torch._dynamo.utils.counters["graph_break"]
    compiler = getattr(engine, "npu_fuse_blocks", None)
    graphs = compiler.graphs if compiler else []
    if rank == 0:
        torch.save(
            {
                "losses": losses, "norms": norms, "moved": moved.item() ** 0.5, "names": names, "breaks": dict(entries),
                "state": state, "summary": compiler.summary() if compiler else "",
                "fused": sum(g.count(Status.FUSED) for g in graphs),
                "left": sum(len(g.sites) - g.count(Status.FUSED) - g.count(Status.SKIPPED) for g in graphs),
                "graphs": len(graphs),
                "weights": {name: value.detach().clone() for name, value in weights.items()},
            },
            given.out,
        )  # fmt: skip
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
