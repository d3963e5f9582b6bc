"""prove="shadow": run the original graph beside the rewritten one on the first calls and compare.

The original runs on copies of everything that it writes into, and from the same random state. Forward
values and written inputs are compared, in relative Euclidean distance; gradients are not. Left out,
with a line in the log: graphs with collectives (a second one would wait for ranks that do not come),
and random graphs where the hand-off draws its numbers in another way (Inductor).
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from npu_fuse import dialect as d
from npu_fuse.capture import graphs_of
from npu_fuse.errors import ShadowMismatch
from npu_fuse.options import Options

logger = logging.getLogger("npu_fuse")

ALLOWED = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative distance of a whole graph's output: rounding adds up over layers."""
COLLECTIVE = ("_c10d_functional", "c10d", "_dtensor")


def copy_of(gm: GraphModule, options: Options) -> GraphModule | None:
    """The graph before it is rewritten, or None where nothing is to be compared."""
    if options.prove != "shadow":
        return None
    nodes = [n for module in graphs_of(gm) for n in module.graph.nodes if n.op.startswith("call")]
    if any(str(n.target).split(".")[0] in COLLECTIVE or "distributed" in str(n.target) for n in nodes):
        logger.info("shadow: a graph with collectives is not run twice")
        return None
    if options.handoff in (None, "inductor") and any(d.name(n) in d.RANDOM for n in nodes):
        logger.info("shadow: a random graph is not compared with Inductor, which draws other numbers")
        return None
    return copy.deepcopy(gm)


def beside(compiled: Callable[..., Any], original: GraphModule | None, options: Options) -> Callable[..., Any]:
    """`compiled`, and on its first calls the original. Raises `ShadowMismatch` or logs, as the options say."""
    if original is None:
        return compiled
    calls_left = options.shadow_calls

    def run(*args: Any) -> Any:
        nonlocal calls_left
        if calls_left <= 0:
            return compiled(*args)
        calls_left -= 1
        copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        inputs = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        state = torch.get_rng_state()
        with torch.no_grad():
            expected = original(*copies)
        torch.set_rng_state(state)
        actual = compiled(*args)
        pairs = [*zip(_flat(expected), _flat(actual), strict=True), *zip(copies, args, strict=True)]
        for index, (left, right) in enumerate(pairs):
            distance = _distance(left, right)
            if distance is not None:
                _report(options, inputs, index, distance)
                break
        return actual

    return run


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, (tuple, list)) else [value]


def _distance(left: Any, right: Any) -> float | None:
    """The relative distance where it is too large, else None."""
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return None
    if left.dtype not in ALLOWED:
        same = left.shape == right.shape and torch.equal(left, right.detach())
        return None if same or left.is_floating_point() or left.is_complex() else float("inf")
    first, second = left.detach().double(), right.detach().double()
    if not torch.equal(first.isfinite(), second.isfinite()):
        return float("inf")
    first, second = first.nan_to_num(0.0, 0.0, 0.0), second.nan_to_num(0.0, 0.0, 0.0)
    scale, difference = float(first.norm()), float((first - second).norm())
    if difference <= ALLOWED[left.dtype] * scale:
        return None
    return difference / scale if scale else float("inf")


def _report(options: Options, inputs: Sequence[Any], index: int, distance: float) -> None:
    dump = None
    if options.shadow_dump is not None:
        os.makedirs(options.shadow_dump, exist_ok=True)
        handle, dump = tempfile.mkstemp(suffix=".pt", prefix="shadow-", dir=options.shadow_dump)
        os.close(handle)
        torch.save(list(inputs), dump)
    where = f"; inputs in {dump}" if dump else "; set shadow_dump to a folder to keep the inputs"
    message = f"shadow: output {index} of the rewritten graph is {distance:.3g} away from the original's{where}"
    if options.shadow_action == "raise":
        raise ShadowMismatch(
            message, dump=dump, remedy="report it with the inputs, and leave the op out with the option skip"
        )
    logger.warning("%s", message)
