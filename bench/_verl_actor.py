"""A real verl FSDP2 actor, one rank, in a process of its own that makes an update whenever it is told to.

A process for each kind: compiled code of one layer class shares Dynamo's cache and its limit, and peaks add up.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _common as common
import torch
from _wide import peak_bytes

sys.path.insert(0, str(common.ROOT / "tests" / "real_verl"))
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "cpu_platform", "VERL_ENGINE_DEVICE": "npu",
    "VERL_ENGINE_VENDOR": "huawei", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",  # looked at by verl, used by nobody: the store is a file
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # compiling in this process: its CPU time counts
}  # fmt: skip
SEQUENCES, MICRO = 8, 4


@contextmanager
def actor(kind: str, checkpoint: Path, dtype: str, tokens: int, handoff: str) -> Iterator[Any]:
    """A function that sends a request ("update", step), ("peak", step) or ("facts",) and gives the answer.

    kind: "fused" with npu_fuse, "eager", anything else with the hand-off alone in the same places.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory(prefix="npu_fuse_verl_") as folder:
        # A cache of compiled kernels of its own: each kind compiles all of its own.
        os.environ |= ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        child = spawn.Process(target=_serve, args=(theirs, kind, str(checkpoint), dtype, tokens, handoff, folder))
        child.start()
        theirs.close()

        def ask(*request: Any) -> Any:
            ours.send(request)
            return ours.recv()

        try:
            ours.recv()  # one after the other: their imports take a core each
            yield ask
        finally:
            ours.send(("stop",))
            child.join(timeout=30)
            child.kill()


def _serve(pipe: Any, kind: str, checkpoint: str, dtype: str, tokens: int, handoff: str, folder: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # verl prints, and the result may be JSON
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    engine = _engine(kind, checkpoint, dtype, handoff)
    handlers = {"update": partial(_update, engine, tokens), "peak": partial(_peak, engine, tokens),
                "facts": partial(_facts, engine)}  # fmt: skip
    pipe.send("ready")
    for name, *given in iter(pipe.recv, ("stop",)):
        pipe.send(handlers[name](*given))
    torch.distributed.destroy_process_group()


def _engine(kind: str, checkpoint: str, dtype: str, handoff: str) -> Any:
    import json

    from actor import make_engine

    from npu_fuse.integrations import verl, verl_blocks

    if kind not in ("eager", "fused"):

        class HandoffAlone(verl_blocks.BlockCompiler):
            def __call__(self, gm: Any, example_inputs: Any) -> Any:
                return torch._dynamo.lookup_backend(handoff)(gm, example_inputs)

            def tell(self) -> None:
                pass

        verl.BlockCompiler = HandoffAlone  # type: ignore[misc]
    fused = {"npu_fuse": {"enable": True, "target": "reference", "handoff": handoff}}
    engine = make_engine(
        SimpleNamespace(
            model=checkpoint, no_checkpointing=False, lora=0, fused=json.dumps({} if kind == "eager" else fused),
            strategy="fsdp2", flat=False, ulysses=1, forward_only=False, dtype=dtype, keep_unsharded=False, micro=MICRO,
        )
    )  # fmt: skip
    engine.initialize()
    return engine


def _update(engine: Any, tokens: int, step: int) -> tuple[float, float]:
    """Seconds of wall clock and of CPU, children included: Inductor calls a compiler."""
    data = _data(engine, tokens, step)
    before = os.times()
    _train(engine, data)
    after = os.times()
    return after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])


def _peak(engine: Any, tokens: int, step: int) -> int:
    data = _data(engine, tokens, step)
    with peak_bytes() as found:
        _train(engine, data)
    return found[0]


def _facts(engine: Any) -> dict[str, Any]:
    from npu_fuse.report import Status

    compiler = getattr(engine, "npu_fuse_blocks", None)
    graphs = compiler.graphs if compiler is not None else []
    return {
        "graphs": len(graphs),
        "sites": sum(g.count(Status.FUSED) for g in graphs),
        "own": sum(sum(g.seconds.values()) for g in graphs),
    }


def _data(engine: Any, tokens: int, step: int) -> Any:
    import verl.utils.tensordict_utils as tu
    from actor import batch

    draw = torch.Generator().manual_seed(step)
    lengths = torch.randint(tokens // 2, tokens + 1, (SEQUENCES,), generator=draw).tolist()
    data = batch(step, 0, common.VOCABULARY, lengths)
    tu.assign_non_tensor(
        data, temperature=1.0, use_remove_padding=True, use_dynamic_bsz=False, micro_batch_size_per_gpu=MICRO,
        use_fused_kernels=False, calculate_entropy=False, global_batch_size=SEQUENCES,
    )  # fmt: skip
    return data


def _train(engine: Any, data: Any) -> None:
    from verl.workers.utils.losses import sft_loss

    with engine.train_mode():
        engine.train_batch(data, partial(sft_loss, config=None))
