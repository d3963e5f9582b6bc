"""A tape of one eager run: every torch function that was called, with its real tensors, in order.

Where code branches on data no graph holds it, but one run is a straight line. The tape keeps what each call was
given and gave, so that parts of the run can be cut out (`cut`) and written down again (`source.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from npu_fuse import dialect as d

SNAPSHOT = 1 << 20
"""Results up to this many elements are kept as they were made: later calls may write into them."""
READS = frozenset(
    "__bool__ __int__ __float__ __index__ __len__ item tolist numpy nonzero argwhere unique unique_consecutive"
    " masked_select is_nonzero equal allclose __contains__ __iter__".split()
)
"""Calls whose result depends on values in a way that no graph of fixed shapes holds."""
OPERATORS: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "add sub mul truediv floordiv mod pow matmul neg eq ne lt le gt ge and_ or_ xor invert getitem setitem"
        " iadd isub imul itruediv lshift rshift"
    ).split()
} | {"__and__": operator.and_, "__or__": operator.or_}
REVERSED = {f"__r{name}__": getattr(operator, name) for name in "add sub mul truediv floordiv pow matmul".split()}


@dataclass(eq=False)
class Step:
    """One call: `out` is what it returned, `values` how its float tensors were at that moment."""

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    grad: bool
    autocast: bool
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def plain(self) -> str:
        """The name without the marks of operators and in-place forms, as rules know it."""
        raw = self.name
        if raw.endswith("_") and not raw.endswith("__"):
            raw = raw[:-1]
        found = d.ALIASES.get(raw, raw)
        if found.startswith("__") and found.endswith("__"):
            found = d.ALIASES.get(found.strip("_"), found.strip("_"))
        return "cast" if found in d.CASTS else found

    @property
    def reads(self) -> bool:
        """The result's shape, or a Python value made of it, depends on values."""
        if self.name in READS or (self.name == "where" and len(self.args) == 1):
            return True
        return self.plain == "getitem" and any(t.dtype is torch.bool for t in tensors_in(self.args[1]))

    @property
    def writes(self) -> bool:
        name = self.name
        if self.kwargs.get("out") is not None or self.kwargs.get("inplace") is True:
            return True
        if name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "setitem"):
            return True
        return name.endswith("_") and not name.endswith("__")

    @property
    def random(self) -> bool:
        if self.plain == "dropout":
            p = self.args[1] if len(self.args) > 1 else self.kwargs.get("p", 0.5)
            training = self.args[2] if len(self.args) > 2 else self.kwargs.get("training", True)
            return bool(p and training)
        return self.plain in d.RANDOM

    def inputs(self) -> list[torch.Tensor]:
        return tensors_in((self.args, self.kwargs))


def name_of(function: Callable[..., Any]) -> str:
    """The function's own name; a property's where its getter is called."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        return str(getattr(getattr(function, "__self__", None), "__name__", name))
    return str(name)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, slice):
        return tensors_in((value.start, value.stop, value.step))
    if not isinstance(value, (tuple, list, dict)):
        return []
    return [t for v in tree_flatten(value)[0] for t in ([v] if isinstance(v, torch.Tensor) else _in_leaf(v))]


def _in_leaf(value: Any) -> list[torch.Tensor]:
    return tensors_in(value) if isinstance(value, slice) else []


class Tape(TorchFunctionMode):
    """Records while it is entered. All tensors stay alive, so that identities and storages mean what they meant."""

    def __init__(self, regions: bool = False) -> None:
        super().__init__()
        self.regions = regions
        self.steps: list[Step] = []
        self.made: dict[int, list[int]] = {}
        """Steps that made or wrote each tensor, by id."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        results = tensors_in(out)
        step = Step(
            len(self.steps), func, tuple(args), kwargs, out, torch.is_grad_enabled(),
            not self.regions or torch.is_autocast_enabled("cpu"),
        )  # fmt: skip
        if not results and not step.reads and not step.writes:
            return out
        written = tensors_in(args[0]) if step.writes and args else []
        for tensor in (*results, *written):
            self.made.setdefault(id(tensor), []).append(step.index)
            if tensor.is_floating_point() and tensor.numel() <= SNAPSHOT and tensor.layout is torch.strided:
                step.values[id(tensor)] = tensor.detach().clone()
        self.steps.append(step)
        return out

    def maker(self, tensor: torch.Tensor, before: int) -> Step | None:
        """The last step before `before` that made or wrote this tensor."""
        for index in reversed(self.made.get(id(tensor), ())):
            if index < before:
                return self.steps[index]
        return None


def cut(
    tape: Tape, wanted: Iterable[tuple[torch.Tensor, int]], stop: Callable[[torch.Tensor, int], bool]
) -> list[Step]:
    """The steps that `wanted` (tensors as they were before a step) need, in order; nothing before what `stop`s.

    What is written into a storage that a needed step reads belongs to it.
    """
    needed: dict[int, Step] = {}
    writers = [s for s in tape.steps if s.writes]
    stack = list(wanted)
    seen: set[tuple[int, int]] = set()
    while stack:
        tensor, before = stack.pop()
        maker = tape.maker(tensor, before)
        if (id(tensor), maker.index if maker else -1) in seen or stop(tensor, before):
            continue
        seen.add((id(tensor), maker.index if maker else -1))
        if maker is not None and maker.index not in needed:
            needed[maker.index] = maker
            stack += [(t, maker.index) for t in maker.inputs()]
        storage = storage_of(tensor)
        for writer in writers if maker is not None else ():
            if writer.index < before and writer.index not in needed and writer.index > maker.index:  # type: ignore[union-attr]
                if writer.args and any(storage_of(t) == storage for t in tensors_in(writer.args[0])):
                    needed[writer.index] = writer
                    stack += [(t, writer.index) for t in writer.inputs()]
    return [needed[i] for i in sorted(needed)]


def storage_of(tensor: torch.Tensor) -> int:
    """A number for the memory that the tensor lies in; its own where it has none (a meta tensor)."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def record(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], regions: bool = False
) -> tuple[Tape, Any]:
    """Run and record. regions: under autocast to float32, which changes nothing in a float32 block, so that the
    regions in which the code turns autocast off are seen."""
    tape = Tape(regions)
    before = torch.get_autocast_dtype("cpu")
    with torch.enable_grad():
        if not regions:
            with tape:
                return tape, function(*args, **kwargs)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float32)
        try:
            with tape:
                return tape, function(*args, **kwargs)
        finally:
            torch.set_autocast_dtype("cpu", before)
            torch.set_autocast_enabled("cpu", False)
            torch.clear_autocast_cache()
