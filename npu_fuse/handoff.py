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
from npu_fuse.aliasing import hands_input_back, unblamed_first_call
from npu_fuse.errors import OptionError
from npu_fuse.handoff_choice import Handoff, choose
from npu_fuse.option_checks import check_mode
from npu_fuse.options import Options
from npu_fuse.targets import Target

SAFE_OPTIONS: dict[str, dict[str, Any]] = {"npugraph_ex": {"inplace_pass": False}}
"""What a hand-off must be told, unless the user says otherwise.

npugraph_ex 2.13 turns `x[:, 1:] - x[:, :-1]` into an in-place subtraction on overlapping memory: wrong
packed-sequence masks in transformers (tests/conformance/test_handoff.py).
"""


def hand_off(gm: GraphModule, example_inputs: Sequence[Any], options: Options, target: Target, training: bool) -> Any:
    """Compile the graph with the hand-off. Its exceptions are its own and go through."""
    chosen = choose(options, target, training)
    name = chosen.name
    check_mode(name, options.mode)
    holds_one = hands_input_back(gm)  # some hand-offs change the graph
    with _tagged(options.cache_tag()):
        if callable(options.handoff):
            compiled = options.handoff(gm, list(example_inputs), **dict(options.handoff_options))
        elif name == "inductor":
            compiled = _inductor(gm, example_inputs, options)
        else:
            compiled = _registered(name)(gm, example_inputs, **_keywords(chosen, options))
    return unblamed_first_call(compiled) if holds_one else compiled


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


def _keywords(chosen: Handoff, options: Options) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    told = {**SAFE_OPTIONS.get(chosen.name, {}), **(options.handoff_options if chosen.given else {})}
    if told:
        keywords["options"] = told
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
