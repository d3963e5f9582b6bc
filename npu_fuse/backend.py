"""The way of a graph: capture → recognise → prove (and agree) → lower → hand off. This file shows nothing else."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from npu_fuse import agree, dump, shadow, steps
from npu_fuse.announce import announce
from npu_fuse.aten import Decompositions
from npu_fuse.capture import graphs_of
from npu_fuse.errors import RanksDisagree
from npu_fuse.handoff import hand_off
from npu_fuse.handoff_choice import choose
from npu_fuse.options import Options
from npu_fuse.passes import RULES
from npu_fuse.proof_cache import disk_cache
from npu_fuse.report import GraphReport, SiteReport, drop, keep
from npu_fuse.targets import Target, target_of
from npu_fuse.view import view_of

logger = logging.getLogger("npu_fuse")
_ids = itertools.count()


def backend(
    gm: GraphModule, example_inputs: Sequence[Any], *,
    options: Mapping[str, Any] | Options | None = None, mode: str | None = None, **_: Any,
) -> Any:  # fmt: skip
    """The `torch.compile` backend "npu_fuse".

    Raises `OptionError` and `TargetError` for what the user asked for, `StrictError` where `strict` asks for it.
    Every fault of npu_fuse itself leaves the graph as it was and is reported.
    """
    chosen = Options.make(options, mode)
    target = target_of(chosen)
    training = is_training(example_inputs)
    original = shadow.copy_of(gm, chosen)
    report = plan(gm, example_inputs, chosen, training, target, together=True)
    keep(report)
    try:
        announce(report, chosen)
        compiled = hand_off(gm, example_inputs, chosen, target, training)
    except BaseException:
        drop(report)  # Dynamo traces again (a symbolic epsilon), or the user sees the exception
        raise
    return shadow.beside(compiled, original, chosen)


@_disable_current_modes()  # a compiler's fake mode: element ids are real values
def plan(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, training: bool, target: Target | None = None, *,
    aten: Decompositions | None = None, together: bool = False,
) -> GraphReport:  # fmt: skip
    """Recognise, prove and lower in place; hand nothing off.

    aten: `gm` is a functionalised graph of overloads, and whoever compiles it decomposes these.
    together: all ranks compile, and must fuse alike.
    """
    target = target if target is not None else target_of(options)
    graph_id = next(_ids)
    dump.graph(options, graph_id, "0_captured", gm)
    nodes = 0
    sites: list[SiteReport] = []
    errors: list[str] = []
    seconds = dict.fromkeys(("recognise", "prove", "lower"), 0.0)
    for module in graphs_of(gm):
        clock = time.perf_counter()
        try:
            nodes += len(module.graph.nodes)
            view = None
            for rules in steps.turns(RULES):
                view = view if view is not None else view_of(module.graph)
                found = steps.recognise(view, rules, options, training)
                clock = _spent(seconds, "recognise", clock)
                steps.prove(found, rules, options, target, disk_cache(options))
                if together and any(rule.communicates for rule in rules):
                    agree.settle(view, found, training, options, target)
                clock = _spent(seconds, "prove", clock)
                steps.put_in(module, view, found, target, aten)
                clock = _spent(seconds, "lower", clock)
                sites += steps.site_reports(found)
                view = None if found else view
        except RanksDisagree:
            raise
        except Exception as fault:
            logger.debug("npu_fuse left a graph alone", exc_info=True)
            errors.append(f"{type(fault).__name__}: {fault}")
    dump.candidates(options, graph_id, sites)
    dump.graph(options, graph_id, "2_lowered", gm)
    handoff = choose(options, target, training)
    return GraphReport(
        graph_id, training, target.name, handoff.name, nodes, tuple(sites), seconds,
        dynamic=_is_dynamic(example_inputs), errors=tuple(errors), handoff_reason=handoff.reason, soc=target.soc,
    )  # fmt: skip


def is_training(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _spent(seconds: dict[str, float], step: str, since: float) -> float:
    now = time.perf_counter()
    seconds[step] += now - since
    return now


def _is_dynamic(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.SymInt) for x in example_inputs)
