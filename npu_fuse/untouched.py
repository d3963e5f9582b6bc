"""Leave no trace: put a model, its inputs, random states and Dynamo's own state back as they were.

`explain` runs the model once to capture it. A model may write to its buffers and attributes as it runs,
Dynamo keeps compiled code on the model's functions and remembers sizes it has seen, and a frame that it
gave up on stays given up on. None of that may change what the user's own `torch.compile` does later.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

_MISSING = object()


@contextmanager
def model_untouched(model: Callable[..., Any], inputs: object) -> Iterator[None]:
    """Restore on exit: attributes, buffers and training mode of `model`'s modules, tensors in `inputs` that
    were written in place, and the random states of torch (every device in use), Python and numpy.

    Not restored: what lives in the model's own lists, dicts and other objects, such as a cache that is
    given as an input. Parameters are taken not to change in a forward pass.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    dicts = [d for m in modules for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
    kept = [(d, dict(d)) for d in dicts]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    copies = _copies([*buffers, *leaves])
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    with _random_states([*buffers, *leaves, *parameters]):
        try:
            yield
        finally:
            for d, saved in kept:
                _restore(d, saved)
            for tensor, version, saved_tensor in copies:
                # Batch norm writes its statistics without counting up the version: compare values too.
                if version is None or _version(tensor) != version or not torch.equal(tensor, saved_tensor):
                    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                        tensor.copy_(saved_tensor)


def _restore(d: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in d.keys() - saved.keys():
        del d[key]
    for key, value in saved.items():
        if d.get(key, _MISSING) is not value:
            d[key] = value


def _copies(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, int | None, torch.Tensor]]:
    made = []
    for tensor in {id(t): t for t in tensors}.values():
        if tensor.is_meta:
            continue
        try:
            made.append((tensor, _version(tensor), tensor.detach().clone()))
        except Exception as error:  # a tensor subclass without clone: it cannot be put back
            logger.debug("cannot keep a copy of a %s: %s", type(tensor).__name__, error)
    return made


def _version(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written to; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _random_states(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    devices: dict[str, set[int]] = {}
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            devices.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    python_state = random.getstate()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def mode_for(model: Callable[..., Any], train: bool) -> Iterator[None]:
    """Grad mode, and a module in training or eval mode and without what `model.compile()` put there.

    Inside of `model_untouched`, which puts modules back.
    """
    if isinstance(model, torch.nn.Module):
        if model.training != train:
            model.train(train)
        for module in model.modules():
            if module.__dict__.get("_compiled_call_impl") is not None:
                module.__dict__["_compiled_call_impl"] = None
    with torch.set_grad_enabled(train):
        yield


@contextmanager
def dynamo_untouched(backend: Callable[..., Any]) -> Iterator[None]:
    """Drop on exit what Dynamo has compiled for `backend`, and nothing that anyone else has compiled.

    `torch._dynamo.reset` would throw the user's compiled code away. Of the functions that Dynamo tried in here,
    those that hold nothing else are reset: their code, and the mark of a function that it gave up on. Of the
    others, the entries made for `backend` are invalidated (torch keeps them, empty). The sizes seen are forgotten, or
    the next compile of the same code with another size would become dynamic.
    """
    from torch._dynamo import convert_frame, pgo, utils

    sizes_seen = copy.deepcopy(pgo._CODE_STATE)
    counters = copy.deepcopy(dict(utils.counters))
    breaks = len(utils.graph_break_reasons)
    earlier, convert_frame.input_codes = convert_frame.input_codes, convert_frame.Tracker()
    try:
        yield
    finally:
        with convert_frame.compile_lock:
            tried, convert_frame.input_codes = convert_frame.input_codes, earlier
            for code in filter(None, [ref() for ref in tried.seen]):
                earlier.add(code)
                _forget(code, backend)
            pgo._CODE_STATE = sizes_seen
            utils.counters.clear()
            utils.counters.update(counters)
            del utils.graph_break_reasons[breaks:]


def _forget(code: types.CodeType, backend: Callable[..., Any]) -> None:
    from torch._C._dynamo import eval_frame
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    entries = eval_frame._debug_get_cache_entry_list(code)
    ours = [e for e in entries if getattr(e.backend, "compiler_fn", e.backend) is backend]
    for entry in ours:
        extra_state = getattr(entry.guard_manager, "extra_state", None)
        if extra_state is not None:
            extra_state.invalidate(entry, DeletedGuardManagerWrapper("npu_fuse.explain has ended"))
    if all(isinstance(entry.guard_manager, DeletedGuardManagerWrapper) for entry in entries):
        eval_frame.reset_code(code)
