"""Read a block's routing off a run: what the experts are given, which of them, and with which weights.

Any integers [T, k] made in the run may be the indices, any numbers [T, k] or [T, E] the weights: the pair that
makes Σ_j w · expert(x) equal to a value of the run is taken. It is a proposal; the proof decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from npu_fuse.block_inputs import Example
from npu_fuse.expert_segment import Segment
from npu_fuse.experts import routed
from npu_fuse.source import CannotWrite
from npu_fuse.tape import Step, Tape, tensors_in

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a sum of experts may be from the run's, relative to its size: other orders of additions, no more."""
MOST = 24
"""Candidates looked at, of each kind."""
GATHERS = frozenset("getitem index_select view reshape unsqueeze squeeze split chunk contiguous flatten".split())


@dataclass
class Routing:
    """x [T, H] (any leading sizes), indices [T, k], weights [T, k] or, `full`, [T, E]; `total` [T, N] their sum."""

    tape: Tape
    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    k: int
    full: bool
    before: bool
    total: torch.Tensor
    example: Example
    first: int
    """The first step of the experts."""
    written: bool = False

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.indices, self.weights

    def sources(self) -> list[tuple[torch.Tensor, int]]:
        """Each with the position right behind the step that made it."""
        return [(t, self._made(t) + 1) for t in self.tensors()]

    def _made(self, tensor: torch.Tensor) -> int:
        """The last step before the experts that made it or wrote into it."""
        steps = [s for s in self.tape.made.get(id(tensor), ()) if s < self.first]
        return steps[-1] if steps and not _is_input(tensor, self.example) else -1

    def is_sum(self, tape: Tape, tensor: torch.Tensor, before: int) -> bool:
        """The tensor, as it was before that step, holds the sum of the experts."""
        maker = tape.maker(tensor, before)
        value = maker.values.get(id(tensor)) if maker is not None else None
        return value is not None and _distance(value, self.total) <= CLOSE[value.dtype]

    def in_run(self, tape: Tape, example: Example, run: RunExperts, number: int) -> Routing:
        """The same values of another run: made by the same calls."""
        x, indices, weights = (self._other(t, tape, example) for t in self.tensors())
        made = Routing(tape, x, indices, weights, self.k, self.full, self.before, x, example, self.first)
        made.total = _total(made, run, number)
        return made

    def _other(self, tensor: torch.Tensor, tape: Tape, example: Example) -> torch.Tensor:
        for mine, other in zip(self.example.tensors, example.tensors, strict=True):
            if tensor is mine:
                return other
        at = self._made(tensor)
        step = self.tape.steps[at]
        twin = tape.steps[at] if at < len(tape.steps) else None
        place = next((i for i, t in enumerate(_touched(step)) if t is tensor), None)
        if place is None or twin is None or twin.name != step.name or len(_touched(twin)) <= place:
            raise CannotWrite("the routing takes another way for other sizes")
        return _touched(twin)[place]


def _touched(step: Step) -> list[torch.Tensor]:
    return [*tensors_in(step.out), *(tensors_in(step.args[0]) if step.writes else [])]


def _is_input(tensor: torch.Tensor, example: Example) -> bool:
    return any(tensor is t for t in example.tensors)


def routing_of(tape: Tape, segment: Segment, example: Example, run: RunExperts, number: int) -> Routing:
    """The routing whose sum of experts is a value of the run; raises `CannotWrite` where there is none."""
    x, before = _rows_of(tape, segment)
    tokens = x.numel() // x.shape[-1]
    best: tuple[float, Routing] | None = None
    given = list(_weights(tape, segment, example))
    outputs: torch.Tensor | None = None
    for indices in _indices(tape, example, tokens, number):
        k = indices.numel() // tokens
        for weights in given:
            if weights.numel() not in (tokens * k, tokens * number) or weights is x:
                continue
            full = weights.numel() == tokens * number and k != number
            made = Routing(tape, x, indices, weights, k, full, before, x, example, segment.first)
            if before:
                made.total = _total(made, run, number)
            else:
                outputs = outputs if outputs is not None else _all_outputs(x, run, number)
                made.total = _mixed(made, outputs)
            found = _closest(tape, segment, made.total)
            if found is not None and (best is None or found < best[0]):
                best = found, made
    if best is None:
        raise CannotWrite("no indices and weights in it give its experts' sum")
    return best[1]


def _rows_of(tape: Tape, segment: Segment) -> tuple[torch.Tensor, bool]:
    """What the experts' rows were taken from, and whether they were weighted first."""
    tensor, at, before = segment.rows, segment.first, False
    while True:
        maker = tape.maker(tensor, at)
        if maker is None or not maker.args:
            return tensor, before
        source = maker.args[0]
        if maker.plain == "mul" and not before and len(maker.args) == 2:
            wide = [t for t in maker.inputs() if t.shape == tensor.shape]
            if len(wide) != 1:
                return tensor, before
            source, before = wide[0], True
        elif maker.plain == "cast" and isinstance(source, torch.Tensor) and source.dtype == tensor.dtype:
            pass
        elif maker.plain not in GATHERS or not isinstance(source, torch.Tensor) or _narrows(source, tensor):
            return tensor, before
        tensor, at = source, maker.index


def _narrows(source: torch.Tensor, tensor: torch.Tensor) -> bool:
    """A part of the features was taken: the rows are no whole rows of the source."""
    return source.dim() == tensor.dim() and source.shape[-1] != tensor.shape[-1]


def _indices(tape: Tape, example: Example, tokens: int, number: int) -> Iterator[torch.Tensor]:
    seen = 0
    for tensor in (*example.tensors, *(t for s in tape.steps if not s.reads for t in tensors_in(s.out))):
        if tensor.is_floating_point() or tensor.dtype is torch.bool or tensor.is_complex():
            continue
        k = tensor.numel() // tokens
        if k < 1 or tensor.numel() % tokens or k > number or tensor.dim() < 1:
            continue
        if tensor.shape[-1] != k and k != 1:
            continue
        if not bool(((tensor >= 0) & (tensor < number)).all()):
            continue
        yield tensor
        seen += 1
        if seen == MOST:
            return


def _weights(tape: Tape, segment: Segment, example: Example) -> Iterator[torch.Tensor]:
    """Numbers made before the experts, the last first."""
    seen: list[int] = []
    steps: list[Step] = tape.steps[: segment.first]
    made = [t for s in reversed(steps) if not s.reads for t in reversed(tensors_in(s.out))]
    for tensor in (*made, *example.tensors):
        if not tensor.is_floating_point() or id(tensor) in seen or tensor.dim() < 1:
            continue
        seen.append(id(tensor))
        yield tensor


def _all_outputs(x: torch.Tensor, run: RunExperts, number: int) -> torch.Tensor:
    """[E, T, N]: every expert on every row."""
    rows = x.detach().reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    ids = torch.arange(number, device=rows.device).repeat_interleave(tokens)
    ends = torch.arange(1, number + 1, device=rows.device) * tokens
    return run(rows.repeat(number, 1), ids, ends).reshape(number, tokens, -1)


def _mixed(made: Routing, outputs: torch.Tensor) -> torch.Tensor:
    tokens = outputs.shape[1]
    indices = made.indices.reshape(tokens, made.k).long()
    rows = outputs[indices, torch.arange(tokens, device=outputs.device).unsqueeze(1)]
    return (rows * _factors(made, tokens).unsqueeze(-1)).sum(1)


def _factors(made: Routing, tokens: int) -> torch.Tensor:
    weights = made.weights.detach().reshape(tokens, -1)
    return weights.gather(1, made.indices.reshape(tokens, made.k).long()) if made.full else weights


def _total(made: Routing, run: RunExperts, number: int) -> torch.Tensor:
    rows = made.x.detach().reshape(-1, made.x.shape[-1])
    indices = made.indices.reshape(rows.shape[0], made.k)
    return routed(run, rows, indices, _factors(made, rows.shape[0]), number, made.before, False)


def _closest(tape: Tape, segment: Segment, total: torch.Tensor) -> float | None:
    """The smallest distance of a later value to the total, if it is small enough."""
    best = None
    for step in tape.steps[segment.first :]:
        for value in step.values.values():
            if value.numel() == total.numel():
                found = _distance(value, total)
                if found <= CLOSE[value.dtype] and (best is None or found < best):
                    best = found
    return best


def _distance(value: torch.Tensor, total: torch.Tensor) -> float:
    if value.numel() != total.numel() or value.shape[-1] != total.shape[-1]:
        return float("inf")
    difference = value.double().reshape(total.shape) - total.double()
    size = float(total.double().norm())
    return float(difference.norm()) / size if size > 0 else float("inf")
