"""Which parameters of a block belong to which expert: stacked ones [E, …], or one of each kind per module.

Read from memory: a matrix that a matmul was given is a part of one expert's parameter if it lies there, whatever
indexing, chunking or transposing led to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from npu_fuse.tape import storage_of


@dataclass(frozen=True)
class Family:
    """One parameter of every expert: `paths` of E parameters, or of one stacked parameter."""

    paths: tuple[str, ...]
    experts: int
    shape: tuple[int, ...]
    """Of one expert's."""

    @property
    def stacked(self) -> bool:
        return len(self.paths) == 1


@dataclass(frozen=True)
class Part:
    """A part of one expert's parameter: rows and columns by (start, stop, step), `turned`: then transposed."""

    family: Family
    expert: int
    rows: tuple[int, int, int] | None = None
    columns: tuple[int, int, int] | None = None
    turned: bool = False

    def of(self, expert: int) -> Part:
        return Part(self.family, expert, self.rows, self.columns, self.turned)


class Params:
    """The parameters of a block by memory. `paths` are those of plain parameters and buffers, by identity."""

    def __init__(self, block: nn.Module) -> None:
        self.paths: dict[int, str] = {}
        named = [*block.named_parameters(), *block.named_buffers()]
        for path, value in named:
            self.paths.setdefault(id(value), path)
        self._members: dict[str, tuple[Family, int]] = {}
        for path, place in _members(block):  # outer containers come first
            self._members.setdefault(path, place)
        self._at: dict[int, tuple[str, torch.Tensor]] = {}
        for path, value in block.named_parameters():
            self._at[storage_of(value)] = (path, value)

    def member(self, path: str) -> bool:
        """A parameter of one of several equal modules."""
        return path in self._members

    def part(self, tensor: torch.Tensor) -> Part | None:
        """The part of an expert's parameter that the tensor is a view of, if it is one."""
        found = self._at.get(storage_of(tensor))
        if found is None or not tensor.is_floating_point():
            return None
        path, whole = found
        if path in self._members:
            family, expert = self._members[path]
            return _part(family, expert, tensor, _offset(tensor, whole), whole)
        return self._stacked_part(path, whole, tensor)

    def _stacked_part(self, path: str, whole: torch.Tensor, tensor: torch.Tensor) -> Part | None:
        if not whole.is_contiguous() or whole.dim() < 2 or tensor.dim() != whole.dim() - 1:
            shape = _rows_of_experts(whole, tensor)
        else:
            shape = tuple(whole.shape[1:])
        if shape is None:
            return None
        size = torch.Size(shape).numel()
        family = Family((path,), whole.numel() // size, shape)
        offset = _offset(tensor, whole)
        return _part(family, offset // size, tensor, offset % size, whole) if family.experts > 1 else None


def _offset(tensor: torch.Tensor, whole: torch.Tensor) -> int:
    return int(tensor.storage_offset()) - int(whole.storage_offset())


def _rows_of_experts(whole: torch.Tensor, tensor: torch.Tensor) -> tuple[int, ...] | None:
    """[E · F, H] whose consecutive F rows are one expert's: the tensor is all of one."""
    if whole.dim() != 2 or tensor.dim() != 2 or not whole.is_contiguous() or whole.numel() % tensor.numel():
        return None
    shape = tuple(tensor.shape if tensor.is_contiguous() else tensor.t().shape)
    offset = _offset(tensor, whole)
    fits = shape[1] == whole.shape[1] and offset % tensor.numel() == 0 and tensor.numel() < whole.numel()
    return shape if fits else None


def _part(family: Family, expert: int, tensor: torch.Tensor, offset: int, whole: torch.Tensor) -> Part | None:
    if tensor.dim() == 1 and len(family.shape) == 1:
        width = family.shape[0]
        step = tensor.stride(0) if tensor.numel() > 1 else 1
        return Part(family, expert, None, _range(offset, tensor.shape[0], step, width))
    if tensor.dim() != 2 or len(family.shape) != 2 or not whole.is_contiguous():
        return None
    height, width = family.shape
    for turned in (False, True):
        view = tensor.t() if turned else tensor
        (rows, columns), (down, along) = view.shape, view.stride()
        if (columns > 1 and along >= width) or (rows > 1 and (down % width or down < width)):
            continue
        first, start = divmod(offset, width)
        last = first + (rows - 1) * (down // width if rows > 1 else 1)
        if last >= height or start + (columns - 1) * (along if columns > 1 else 1) >= width:
            continue
        return Part(
            family, expert, _range(first, rows, down // width if rows > 1 else 1, height),
            _range(start, columns, along if columns > 1 else 1, width), turned,
        )  # fmt: skip
    return None


def _range(start: int, number: int, step: int, size: int) -> tuple[int, int, int] | None:
    """None where everything is taken."""
    if start == 0 and step == 1 and number == size:
        return None
    return start, min(start + (number - 1) * step + 1, size), step


def _members(block: nn.Module) -> Iterator[tuple[str, tuple[Family, int]]]:
    """Parameters of modules that a container holds several equal ones of."""
    for path, container in block.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            continue  # gate and up of one expert are equal too
        children = list(container.named_children())
        for group in alike(children).values():
            if len(group) < 2:
                continue
            prefix = path + "." if path else ""
            for rest, first in group[0][1].named_parameters():
                paths = tuple(f"{prefix}{name}.{rest}" for name, _ in group)
                family = Family(paths, len(group), tuple(first.shape))
                for expert, member in enumerate(paths):
                    yield member, (family, expert)


def alike(children: Sequence[tuple[str, nn.Module]]) -> Mapping[object, list[tuple[str, nn.Module]]]:
    """Children with parameters by class and by the names, shapes and dtypes of their parameters."""
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    for name, child in children:
        described = tuple((n, tuple(p.shape), p.dtype) for n, p in child.named_parameters())
        if described:
            groups.setdefault((type(child), described), []).append((name, child))
    return groups
