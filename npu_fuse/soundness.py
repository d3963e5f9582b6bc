"""What stops every rewrite, whatever the rule: writes, scopes, devices, tensor subclasses."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.sites import Site
from npu_fuse.view import View, static

PLAIN = (FakeTensor, torch.Tensor, torch.nn.Parameter)


def obstacle(view: View, site: Site) -> tuple[str, str] | None:
    """The reason code and the fact that forbid replacing the site, or None."""
    return _values(view, site) or _precision(site) or _scopes(view, site) or _writes(view, site)


def _values(view: View, site: Site) -> tuple[str, str] | None:
    devices = set()
    for node in (*site.inputs, *site.nodes):
        found = d.tensor(node)
        if found is None:
            continue
        if type(found) not in PLAIN and not site.facts.get("dtensors"):
            return "tensor.subclass", f"{node.name} is a {type(found).__name__}"
        if found.layout != torch.strided or found.is_quantized or found.is_nested:
            return "tensor.layout", f"{node.name} is no dense tensor ({found.layout})"
        shape = found.shape
        for size in shape:
            if size == 0 if size.__class__ is int else static(size) == 0:
                return "tensor.empty", f"{node.name} is empty: shape {tuple(shape)}"
        if len(shape) > 0:
            devices.add(found.device)
    if len(devices) > 1:
        return "tensor.device", f"the site spans {', '.join(sorted(map(str, devices)))}"
    if devices and next(iter(devices)).type == "meta":
        return "tensor.meta", "the tensors hold no values (device meta)"
    return None


def _precision(site: Site) -> tuple[str, str] | None:
    """Values inside the site hold all that x holds, or all that the result holds.

    What is rounded to less than both (float8, a statistic in float16 that overflows) computes something.
    """
    ends = {t.dtype for n in (site.inputs[0], site.output) if (t := d.tensor(n)) is not None}
    for node in site.nodes:
        found = d.tensor(node)
        if found is None or found.dtype in ends or not found.dtype.is_floating_point:
            continue
        if not any(end.is_floating_point and _holds(found.dtype, end) for end in ends) and _rounds(node, found.dtype):
            kept = " and ".join(sorted(str(end).removeprefix("torch.") for end in ends))
            return "dtype.narrow", f"{node.name} is rounded to {str(found.dtype).removeprefix('torch.')} between {kept}"
    return None


def _rounds(node: Node, dtype: torch.dtype) -> bool:
    """The node narrows an operand: a table that comes in a narrow dtype is not rounded by being moved."""
    operands = [t.dtype for n in d.data_inputs(node) if (t := d.tensor(n)) is not None]
    return not operands or any(not found.is_floating_point or not _holds(dtype, found) for found in operands)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    left, right = torch.finfo(wide), torch.finfo(narrow)
    return left.max >= right.max and left.eps <= right.eps


def _scopes(view: View, site: Site) -> tuple[str, str] | None:
    if any(n in view.in_functorch for n in site.nodes):
        return "scope.functorch", "inside a functorch transform (vmap, grad)"
    if len({view.scope[n] for n in site.nodes}) > 1:
        return "scope.change", "grad mode or autocast changes inside the site"
    return None


def _writes(view: View, site: Site) -> tuple[str, str] | None:
    """Inputs read the same at the end of the site; what the site writes nobody else sees."""
    if not view.mutations:
        return None
    region = set(site.nodes)
    first = view.position[site.nodes[0]]
    last = max(view.position[n] for n in (*site.nodes, site.output))
    for node in (*site.inputs, *(twin for twin, _ in site.twins)):
        writes = view.mutations.get(view.storage.get(node, -1), ())
        if any(first <= w <= last for w in writes):
            return "write.input", f"{node.name} is written in place before the site ends"
        output = d.tensor(site.output)
        if output is not None and output.requires_grad and any(w > last for w in writes):
            return "write.later", f"{node.name} is written in place later, and the fused op keeps it for backward"
    for node in site.nodes:
        writes = view.mutations.get(view.storage.get(node, -1), ())
        inside = [w for w in writes if view.position[node] < w <= last or view.nodes[w] in region]
        if not inside:
            continue
        if any(view.nodes[w] not in region for w in inside):
            return "write.inner", f"{node.name} is written in place by code outside the site"
        for alias in view.aliases.get(view.storage[node], ()):
            # A view taken when the site is done is a view of its result.
            if alias not in region and view.position[alias] <= last:
                return "write.alias", f"{alias.name} shares memory that the site writes"
            if alias in region and alias is not site.output and any(u not in region for u in alias.users):
                return "write.alias", f"{alias.name} is read elsewhere after the site wrote it"
    written = not site.extra_outputs or view.storage.get(site.output, -1) in view.mutations
    if written and any(user not in region and view.position[user] < last for user in site.output.users):
        return "write.read", f"{site.output.name} is read before the site has written all of it"
    return None


def tensor_inputs(site: Site) -> list[Node]:
    return [n for n in site.inputs if d.tensor(n) is not None]
