"""Layers at the widths of released models, without their memory: weights are never written nor read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import _common as common
import torch
import transformers
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS = {"head_dim": 128, "num_attention_heads": 64, "num_hidden_layers": 1, "vocab_size": 256, "use_cache": False}
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-70B": ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_key_value_heads": 8}),
    "Qwen3-235B": (
        "qwen3_moe",
        {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_key_value_heads": 4,
         "num_experts": 128, "num_experts_per_tok": 8},
    ),
}  # fmt: skip


class _Captured(Exception):
    """Ends a compile once the graph has been seen: the layer is never run."""


def capture(name: str, dtype: torch.dtype, sequence: int, visit: Callable[[GraphModule, Any], None]) -> None:
    """Call `visit(gm, example_inputs)` inside Dynamo's backend for one training layer of `WIDE[name]`."""
    architecture, settings = WIDE[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**HEADS, **settings))
    _hollow(model, dtype)

    def seen(gm: GraphModule, example_inputs: Any) -> Any:
        visit(gm, example_inputs)
        raise _Captured

    torch._dynamo.reset()
    try:
        common.step(torch.compile(model.train(), backend=seen), common.words(1, sequence), train=True)
    except BackendCompilerFailed as stopped:
        if not isinstance(stopped.inner_exception, _Captured):
            raise
    finally:
        torch._dynamo.reset()


def _hollow(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                # Pages of an untouched `empty` are never mapped: the weights cost address space only.
                module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Appends the most bytes of tensors that were alive at once, beyond those alive at the start."""
    found: list[int] = []
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        yield found
    live = most = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    found.append(most)


@contextmanager
def watched_proofs(results: list[dict[str, Any]]) -> Iterator[None]:
    """Append seconds, bytes and verdict of every proof that is made (not read from a cache)."""
    from npu_fuse import proofs

    prove = proofs.prove

    def watched(site: Any, form: Any, *rest: Any) -> Any:
        verdicts: list[Any] = []
        taken = common.spent(lambda: verdicts.append(prove(site, form, *rest)))
        with peak_bytes() as peak:
            prove(site, form, *rest)
        results.append(
            {"op": site.op, "form": form.name, "holds": verdicts[0].holds, "reason": verdicts[0].reason,
             "wall": taken.wall, "cpu": taken.cpu, "bytes": peak[0]}
        )  # fmt: skip
        return verdicts[0]

    with mock.patch.object(proofs, "prove", watched):
        yield
