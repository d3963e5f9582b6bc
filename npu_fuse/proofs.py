"""Each distinct rewrite is proved once: a structure's key, and verdicts kept by it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.prove import Verdict, prove
from npu_fuse.sites import Form, Site
from npu_fuse.targets import REFERENCE, Target

_verdicts: dict[str, Verdict] = {}
_digests: dict[Hashable, str] = {}
_targets: dict[Any, str] = {}
"""Names of targets in keys: a target means the same in every graph."""


def verdict_on(
    site: Site, form: Form, numerics: str, always: bool, disk: Any = None, target: Target = REFERENCE
) -> Verdict:
    """The verdict kept for this structure, or a new proof."""
    bare = " bare" if target.names_in_graph else ""
    key = structure_key(site, form, f"{numerics} {target.name}{bare}")
    if not always:
        found = _verdicts.get(key)
        if found is None and disk is not None:
            found = disk.load(key)
        if found is not None:
            if not found.facts.cached:
                found = _verdicts[key] = replace(found, facts=replace(found.facts, cached=True))
            return found
    verdict = prove(site, form, numerics, target)
    _verdicts[key] = verdict
    if disk is not None:
        disk.store(key, verdict)
    return verdict


def forget_verdicts() -> None:
    """Prove everything anew (for tests and measurements)."""
    _verdicts.clear()
    _digests.clear()


def structure_key(site: Site, form: Form, numerics: str) -> str:
    """Equal for sites that compute the same on tensors of the same shapes and dtypes."""
    names: dict[Node, int] = {n: -1 - i for i, n in enumerate(site.inputs)}
    parts: list[Hashable] = [site.op, form.name, str(form.key), numerics, site.facts.get("kept")]
    parts += [_described(n) for n in site.inputs]
    names |= {twin: names[node] for twin, node in site.twins}
    for node in site.nodes:
        names[node] = len(parts)
        other = site.stand_ins.get(node)
        if other is not None:
            parts.append((str(other.key), _encode(other.operands, names), _described(node)))
            continue
        args, kwargs = (node.args, node.kwargs) if d.name(node) != "cast" else (node.args[:1], {})
        given = _encode(kwargs, names) if kwargs else ()
        parts.append((_target(node), _encode(args, names), given, _described(node)))
    parts += [names.get(n) for n in (site.output, *site.extra_outputs)]
    key = tuple(parts)
    digest = _digests.get(key)
    if digest is None:
        digest = _digests[key] = hashlib.sha256(repr((torch.__version__, key)).encode()).hexdigest()
    return digest


def _target(node: Node) -> str:
    found = _targets.get((node.op, node.target))
    if found is None:
        found = f"{node.op}:{d.raw_name(node)}:{getattr(node.target, '__module__', '')}"
        _targets[node.op, node.target] = found
    return found


def _described(node: Node) -> Hashable:
    found = d.local(node)
    if found is None:
        return type(d.value(node)).__name__
    shape: tuple[Any, ...] = tuple(found.shape)
    for size in shape:
        if size.__class__ is not int:
            shape = tuple([s if s.__class__ is int else str(s) for s in shape])
            break
    whole = d.tensor(node)
    return (found.dtype, shape, whole is not None and whole.requires_grad)


def _encode(arg: Any, names: dict[Node, int]) -> Hashable:
    """Nodes of the site as integers, everything else as text."""
    if isinstance(arg, Node):
        return names[arg] if arg in names else f"outer:{d.value(arg)}"
    if isinstance(arg, (tuple, list)):
        return tuple([_encode(a, names) for a in arg])
    if isinstance(arg, dict):
        return tuple([(k, _encode(v, names)) for k, v in sorted(arg.items())])
    if isinstance(arg, slice):
        return ("slice", _encode(arg.start, names), _encode(arg.stop, names), _encode(arg.step, names))
    return str(arg)
