"""vllm-ascend's compiler, where its pass manager is skipped: what is handed to npugraph_ex is fused before.

With cudagraph_mode FULL and FULL_DECODE_ONLY, `npugraph_ex_compile(graph, example_inputs, compiler_config, vllm_config,
...)` of `vllm_ascend.compilation.compiler_interface` gets Dynamo's graph, and nobody's pass runs on it. The compiler's
`compute_hash(vllm_config)` keys the cache of compiled graphs and knows nothing of passes. Both have stood like this
from vllm-ascend 0.18.0 to 0.23.0 and in its main of August 2026.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

FUNCTION = "npugraph_ex_compile"
PassOf = Callable[[Any], Any]
"""The pass of a `VllmConfig`, or None."""


def watch(platform: Any, pass_of: PassOf) -> None:
    """See to it that the platform's compiler fuses first, once vLLM asks for that compiler's name."""
    original = platform.get_compile_backend
    if getattr(original, "npu_fuse", False):
        return

    @functools.wraps(original)
    def named() -> str:
        name = str(original())
        fuses_first(name, pass_of)
        return name

    named.npu_fuse = True  # type: ignore[attr-defined]
    type(platform).get_compile_backend = staticmethod(named)


def fuses_first(name: str, pass_of: PassOf) -> bool:
    """Put the pass before npugraph_ex in the module of the compiler class `name`; False where it has none."""
    path, _, compiler = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ImportError:
        return False
    original = getattr(module, FUNCTION, None)
    if original is None:
        return False
    if getattr(original, "npu_fuse", False):
        return True

    @functools.wraps(original)
    def compiled(
        graph: Any, example_inputs: Any, compiler_config: Any, vllm_config: Any, *rest: Any, **more: Any
    ) -> Any:
        found = pass_of(vllm_config)
        if found is not None:
            found.before(graph, example_inputs, "npugraph_ex")
        return original(graph, example_inputs, compiler_config, vllm_config, *rest, **more)

    compiled.npu_fuse = True  # type: ignore[attr-defined]
    setattr(module, FUNCTION, compiled)
    _keys_its_cache(getattr(module, compiler), pass_of)
    return True


def _keys_its_cache(compiler: Any, pass_of: PassOf) -> None:
    original = compiler.compute_hash

    @functools.wraps(original)
    def compute_hash(self: Any, vllm_config: Any) -> str:
        found = pass_of(vllm_config)
        own = str(original(self, vllm_config))
        return own if found is None else f"{own}-{found.uuid()}"

    compiler.compute_hash = compute_hash
