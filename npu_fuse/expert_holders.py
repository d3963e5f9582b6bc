"""Find blocks that hold experts: several equal modules beside a router as wide, or stacked parameters [E, …]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from npu_fuse.expert_params import alike


@dataclass(frozen=True)
class Holder:
    """Experts of one block. `blocks`: paths of the modules whose forward may be the whole of it, innermost first."""

    path: str
    blocks: tuple[str, ...]
    experts: int
    widths: tuple[int, ...]
    """Widths that its input may have, the likeliest first."""


def holders(model: nn.Module) -> list[Holder]:
    """Innermost first: a list of layers may look like one of experts."""
    found: list[Holder] = []
    for path, module in model.named_modules():
        experts = _stacked(module) or _listed(model, path, module) or _flattened(model, path, module)
        if experts:
            blocks = tuple(_blocks(model, path))
            if blocks:
                found.append(Holder(path, blocks, experts, _widths(model, path, blocks, experts)))
    return sorted(found, key=lambda h: -h.path.count("."))


def likely(model: nn.Module, holder: Holder) -> bool:
    """A router as wide as there are experts stands beside them."""
    inner = {id(p) for p in model.get_submodule(holder.path).parameters()}
    for block in holder.blocks:
        for parameter in model.get_submodule(block).parameters():
            if id(parameter) not in inner and parameter.dim() == 2 and holder.experts in parameter.shape:
                return True
    return False


def _stacked(module: nn.Module) -> int:
    """E of parameters [E, …] of three dimensions that the module holds itself."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)):
        return 0
    sizes = {p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3}
    return min(sizes) if sizes and min(sizes) > 1 else 0


def _flattened(model: nn.Module, path: str, module: nn.Module) -> int:
    """E of parameters [E · F, H] of one shape, where a router [E, H] stands beside them."""
    shapes = Counter(tuple(p.shape) for p in module._parameters.values() if p is not None and p.dim() == 2)
    equal = [s for s, number in shapes.items() if number > 1]
    for block in _blocks(model, path) if len(equal) == 1 else ():
        for parameter in model.get_submodule(block).parameters():
            number, fits = parameter.shape[0], parameter.dim() == 2 and parameter.shape[1] == equal[0][1]
            if fits and 1 < number < equal[0][0] and equal[0][0] % number == 0:
                return int(number)
    return 0


def _listed(model: nn.Module, path: str, module: nn.Module) -> int:
    """E of equal children with matrices, where a router as wide stands beside them."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return 0
    groups = [g for g in alike(list(module.named_children())).values() if len(g) > 1]
    groups = [g for g in groups if any(p.dim() == 2 for p in g[0][1].parameters())]
    if len(groups) != 1:
        return 0
    number = len(groups[0])
    inner = {id(p) for _, child in groups[0] for p in child.parameters()}
    for block in _blocks(model, path):
        for parameter in model.get_submodule(block).parameters():
            if id(parameter) not in inner and parameter.dim() == 2 and number in parameter.shape:
                return number
    return 0


def _blocks(model: nn.Module, path: str) -> Iterator[str]:
    """The module itself, the one that holds it, and that one's, as far as they have a forward of their own."""
    for _ in range(3):
        module = model.get_submodule(path)
        if _has_forward(module):
            yield path
        if not path:
            return
        path = path.rpartition(".")[0]


def _has_forward(module: nn.Module) -> bool:
    forward = type(module).forward
    return forward not in (nn.ModuleList.forward, nn.ModuleDict.forward, nn.Module.forward)


def _widths(model: nn.Module, path: str, blocks: tuple[str, ...], experts: int) -> tuple[int, ...]:
    """A router's other size first, then the sizes of the experts' matrices by how often they occur."""
    routers: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for parameter in model.get_submodule(blocks[-1]).parameters():
        if parameter.dim() == 2 and experts in parameter.shape:
            routers.update(s for s in parameter.shape if s != experts)
    for parameter in model.get_submodule(path).parameters():
        if parameter.dim() in (2, 3):
            sizes.update(parameter.shape[-2:])
    ordered = [s for s, _ in (*routers.most_common(2), *sizes.most_common(6))]
    return tuple(dict.fromkeys(ordered))[:4]
