"""Programs as text: a spelling is a few lines of Python, so that parts combine and every failure can be read.

A program computes `result` from named inputs. `lifted` is the same mathematics with every change of
floating dtype made a change to float64: the judge of how accurate another form is.
"""

from __future__ import annotations

import itertools
import linecache
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_numbers = itertools.count()


@dataclass(frozen=True)
class Program:
    """`lines` are statements; `result` is what is returned; `inputs` are argument names in order."""

    name: str
    inputs: tuple[str, ...]
    lines: tuple[str, ...]
    result: str

    @property
    def text(self) -> str:
        body = "\n".join(f"    {line}" for line in (*self.lines, f"return {self.result}"))
        return f"def program({', '.join(self.inputs)}):\n{body}\n"

    def function(self) -> Callable[..., Any]:
        return compiled(self.text, self.name)

    def lifted(self, dtype: torch.dtype) -> Callable[..., Any]:
        """To be called with float64 inputs: roundings are gone, what `half()`, `bfloat16()` and float8 compute stays.

        `dtype` is that of the inputs in the graph: casts to float32 copy where it is another one.
        """
        copies = ".double().clone()" if dtype is not torch.float32 else ".double()"
        text = re.sub(r"\.float\(\)", copies, self.text)
        text = re.sub(r"(\.half\(\)|\.bfloat16\(\)|\.(?:to|type)\([^()]*torch\.float16[^()]*\))", r"\1.double()", text)
        text = re.sub(r"torch\.(float32|bfloat16)\b", "torch.float64", text)
        text = re.sub(r"Tensor\.float\b", "Tensor.double", text)
        return compiled(text, f"{self.name} in float64")

    def __str__(self) -> str:
        return f"# {self.name}\n{self.text}"


def compiled(text: str, name: str) -> Callable[..., Any]:
    """The function of the text, with its own source file: reports name its lines."""
    file = f"<{name} #{next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "math": math}
    exec(compile(text, file, "exec"), namespace)
    function: Callable[..., Any] = namespace["program"]
    return function


def program(name: str, inputs: str, text: str) -> Program:
    """From text whose last line is the result; lines are split at newlines and semicolons."""
    parts = [part for line in text.strip().splitlines() for part in _statements(line)]
    return Program(name.replace("\n", "; "), tuple(inputs.split()), tuple(parts[:-1]), parts[-1])


def _statements(line: str) -> list[str]:
    """Compound statements keep their indentation; plain ones are split at semicolons."""
    if line.startswith(" ") or line.rstrip().endswith(":"):
        return [line.rstrip()]
    return [part.strip() for part in line.split(";") if part.strip()]


def combinations(tables: Sequence[Sequence[Any]], count: int, seed: int = 0) -> list[tuple[Any, ...]]:
    """Every option of every table at least once beside the first ones, then seeded random picks, no repeats."""
    first = tuple(table[0] for table in tables)
    found = {first: None}
    for i, table in enumerate(tables):
        for option in table[1:]:
            found[(*first[:i], option, *first[i + 1 :])] = None
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(len(table) for table in tables)
    while len(found) < min(count, total):
        picks = [int(torch.randint(len(table), (), generator=generator)) for table in tables]
        found[tuple(table[p] for table, p in zip(tables, picks, strict=True))] = None
    return list(found)
