"""Write steps of a tape down as Python, for any size: two runs on inputs of different sizes say which numbers vary.

A number that is the same in both runs is written as it is; one that is a size of the input, or a multiple of the
number of its rows, as that. Everything else is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from npu_fuse.tape import OPERATORS, REVERSED, Step


class CannotWrite(Exception):
    """Something on the tape has no spelling that holds for other inputs."""


class Writer:
    """Lines of a function. `sizes` are expressions and what they were in both runs."""

    def __init__(self, sizes: Mapping[str, tuple[int, int]], device: str) -> None:
        self.sizes = sizes
        self.device = device
        """An expression for the device that the runs were on."""
        self.lines: list[str] = []
        self.values: dict[str, Any] = {"torch": torch}
        self._names: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._count = 0
        self._open = ""

    def name(self, first: torch.Tensor, second: torch.Tensor, expression: str) -> None:
        """From now on these two (the same value in both runs) are written so."""
        self._names[0][id(first)] = expression
        self._names[1][id(second)] = expression

    def known(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._names[0]

    def name_of(self, tensor: torch.Tensor) -> str:
        """How the tensor of the first run is written."""
        found = self._names[0].get(id(tensor))
        if found is None:
            raise CannotWrite("a tensor comes from outside the block's inputs and parameters")
        return found

    def fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def line(self, text: str, context: str = "") -> None:
        """A line, inside `with context:` where there is one."""
        if context != self._open:
            self._open = context
            if context:
                self.lines.append(f"with {context}:")
        self.lines.append(f"    {text}" if context else text)

    def step(self, first: Step, second: Step) -> None:
        if _different(first, second):
            raise CannotWrite(f"{first.name} is called in one run where {second.name} is in another")
        if first.reads or first.random:
            raise CannotWrite(f"{first.name} {'depends on values' if first.reads else 'draws random numbers'}")
        context = ", ".join(
            (["torch.no_grad()"] if not first.grad else [])
            + ([f"torch.autocast({self.device}.type, enabled=False)"] if not first.autocast else [])
        )
        called = self.call(first, second)
        self.line(self.results(first.out, second.out, first) + called, context)

    def results(self, first: Any, second: Any, step: Step) -> str:
        """Names for what a call gives; a written operand keeps its name."""
        if isinstance(first, torch.Tensor):
            if step.writes and self.known(first):
                return ""
            name = self.fresh()
            self.name(first, second, name)
            return f"{name} = "
        if not isinstance(first, (tuple, list)) or not all(isinstance(t, torch.Tensor) for t in first):
            return ""
        names = [self.fresh() for _ in first]
        for one, other, name in zip(first, second, names, strict=True):
            self.name(one, other, name)
        return f"({', '.join(names)},) = "

    def call(self, first: Step, second: Step) -> str:
        function, name = first.function, first.name
        args = [self.expression(a, b) for a, b in zip(first.args, second.args, strict=True)]
        named = [f"{k}={self.expression(v, second.kwargs[k])}" for k, v in first.kwargs.items()]
        if getattr(function, "__name__", "") == "__get__":
            return f"{args[0]}.{name}"
        if name in REVERSED and len(args) == 2 and not named:
            return f"{self.function(REVERSED[name])}({args[1]}, {args[0]})"
        if name in OPERATORS and not named:
            return f"{self.function(OPERATORS[name])}({', '.join(args)})"
        if args and isinstance(first.args[0], torch.Tensor) and getattr(torch.Tensor, name, None) == function:
            return f"{args[0]}.{name}({', '.join([*args[1:], *named])})"
        return f"{self.function(function)}({', '.join([*args, *named])})"

    def function(self, function: Callable[..., Any]) -> str:
        """A global name for a function."""
        module = str(getattr(function, "__module__", None) or "torch").lstrip("_")
        name = re.sub(r"\W", "_", f"{module}.{getattr(function, '__name__', 'function')}")
        while self.values.get(name, function) is not function:
            name += "_"
        self.values[name] = function
        return name

    def expression(self, first: Any, second: Any) -> str:
        if isinstance(first, torch.Tensor):
            found, other = self._names[0].get(id(first)), self._names[1].get(id(second))
            if found is None or found != other:
                raise CannotWrite("a tensor comes from outside the block's inputs and parameters")
            return found
        if type(first) is not type(second):
            raise CannotWrite(f"{first!r} in one run is {second!r} in another")
        if isinstance(first, (tuple, list)):
            if len(first) != len(second):
                raise CannotWrite("lists of different lengths in two runs")
            inner = ", ".join(self.expression(a, b) for a, b in zip(first, second, strict=True))
            return f"[{inner}]" if isinstance(first, list) else f"({inner}{',' if len(first) == 1 else ''})"
        if isinstance(first, slice):
            parts = ((first.start, second.start), (first.stop, second.stop), (first.step, second.step))
            return f"slice({', '.join(self.expression(a, b) for a, b in parts)})"
        if isinstance(first, int) and not isinstance(first, bool):
            return self.number(first, second)
        return self.constant(first, second)

    def number(self, first: int, second: int) -> str:
        if first == second:
            return str(first)
        for text, (one, other) in self.sizes.items():
            if first % one == 0 and second % other == 0 and first // one == second // other and first:
                return text if first == one else f"{text} * {first // one}"
        raise CannotWrite(f"{first} in one run is {second} in another, and neither is a size of the inputs")

    def constant(self, first: Any, second: Any) -> str:
        if isinstance(first, torch.device):
            return self.device
        if isinstance(first, float):
            if first != second and not (math.isnan(first) and math.isnan(second)):
                raise CannotWrite(f"{first!r} in one run is {second!r} in another")
            return repr(first) if math.isfinite(first) else f"float({str(first)!r})"
        if first is None or isinstance(first, (bool, str)):
            if first != second:
                raise CannotWrite(f"{first!r} in one run is {second!r} in another")
            return repr(first)
        if first is Ellipsis:
            return "..."
        if isinstance(first, (torch.dtype, torch.memory_format, torch.layout)) and first is second:
            return repr(first)
        raise CannotWrite(f"a {type(first).__name__} is given to a torch function")


def _different(first: Step, second: Step) -> bool:
    if first.name != second.name or len(first.args) != len(second.args):
        return True
    return first.kwargs.keys() != second.kwargs.keys()


def function_text(name: str, arguments: Sequence[str], lines: Sequence[str]) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"def {name}({', '.join(arguments)}):\n{body}\n"
