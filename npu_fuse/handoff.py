"""Hand the rewritten graph to another torch.compile backend, under a cache tag of our own.

torch's compile caches hash ops by name: without the tag they were seen to serve a graph that was made
under an older formula or another target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from npu_fuse import ops
from npu_fuse.errors import OptionError
from npu_fuse.option_checks import check_mode
from npu_fuse.options import Options
from npu_fuse.targets import Target

SAFE_OPTIONS: dict[str, dict[str, Any]] = {"npugraph_ex": {"inplace_pass": False}}
"""What a hand-off must be told, unless the user says otherwise.

npugraph_ex 2.13 turns `x[:, 1:] - x[:, :-1]` into an in-place subtraction on overlapping memory: wrong
packed-sequence masks in transformers (tests/conformance/test_handoff.py).
"""


def handoff_name(options: Options, target: Target, training: bool) -> str:
    """The hand-off by name: the user's, or the default of the target."""
    if isinstance(options.handoff, str):
        return options.handoff
    if options.handoff is not None:
        return str(getattr(options.handoff, "__name__", "callable"))
    return default_handoff(target, training)


def default_handoff(target: Target, training: bool) -> str:
    """Inductor on CPUs and GPUs; on an NPU its graph mode where registered, in inference."""
    if target.name != "npu":
        return "inductor"
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(exclude_tags=())
    if not training and "npugraph_ex" in known:
        return "npugraph_ex"
    return "aot_eager"


def hand_off(gm: GraphModule, example_inputs: Sequence[Any], options: Options, target: Target, training: bool) -> Any:
    """Compile the graph with the hand-off. Its exceptions are its own and go through."""
    name = handoff_name(options, target, training)
    check_mode(name, options.mode)
    with _tagged(options.cache_tag()):
        if callable(options.handoff):
            return options.handoff(gm, list(example_inputs), **dict(options.handoff_options))
        if name == "inductor":
            return _inductor(gm, example_inputs, options)
        return _registered(name)(gm, example_inputs, **_keywords(name, options))


def _inductor(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Any:
    """Inductor generates code from our ops' bodies: nothing is lost against plain Inductor."""
    from torch._inductor.compile_fx import compile_fx

    _decomposed_by_inductor()
    patches: dict[str, Any] = dict(options.handoff_options)
    if options.mode is not None:
        patches = {**torch._inductor.list_mode_options(options.mode), **patches}
    return compile_fx(gm, list(example_inputs), config_patches=patches or None)


def _decomposed_by_inductor() -> None:
    """Put our ops into Inductor's own table: a table given as an argument keeps its cache from being used."""
    from torch._inductor import decomposition

    missing = {op: body for op, body in ops.decompositions().items() if op not in decomposition.decompositions}
    if missing:
        decomposition.decompositions.update(missing)
        decomposition.fast_random_decomps.cache_clear()
        from torch._inductor import lowering

        keep_call: Any = lowering.make_fallback
        for op in ops.may_stay_calls():
            keep_call(op, lowering.constrain_to_fx_strides, warn=False, override_decomp=True)


def _registered(name: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup_backend(name)
    except InvalidBackend as missing:
        raise OptionError(
            f"handoff {name!r} is no torch.compile backend here",
            key="handoff",
            remedy="see torch._dynamo.list_backends() for the names, or give a callable",
        ) from missing


def _keywords(name: str, options: Options) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    chosen = {**SAFE_OPTIONS.get(name, {}), **options.handoff_options}
    if chosen:
        keywords["options"] = chosen
    if options.mode is not None:
        keywords["mode"] = options.mode
    return keywords


@contextlib.contextmanager
def _tagged(tag: str) -> Iterator[None]:
    config = torch.compiler.config
    before = config.cache_key_tag
    config.cache_key_tag = f"{before}|{tag}" if before else tag
    try:
        yield
    finally:
        config.cache_key_tag = before
