"""What `flow` knows about the values of a run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

MOVES = frozenset(
    """view _unsafe_view reshape transpose t permute slice select split split_with_sizes unbind chunk expand
    clone _to_copy to squeeze unsqueeze alias detach contiguous index index_select gather flatten repeat copy_
    lift_fresh _reshape_alias as_strided view_as_real view_as_complex unsafe_split unsafe_chunk roll flip
    native_dropout dropout""".split()
)
SAME_SHAPE_MOVES = frozenset("clone _to_copy to alias detach contiguous lift_fresh neg".split())
PROJECTIONS = frozenset("mm addmm bmm baddbmm matmul linear _grouped_mm".split())
CLAMPS = frozenset("clamp clamp_min clamp_max minimum maximum".split())
ids = itertools.count()


@dataclass(frozen=True)
class Origin:
    """The projection a value comes from; `changes` are what was done to it since."""

    uid: int
    operation: str
    source: Tensor
    changes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Root:
    """(statistic)^±½; `uid` names the inverse root that was taken."""

    uid: int
    power: float
    of_mean_square: bool


@dataclass(frozen=True)
class Facts:
    """What is known about a value."""

    constant: bool = False
    origin: Origin | None = None
    activation: str | None = None
    inner: tuple[str, Tensor] | None = None  # sigmoid, tanh, erf or exp and its input
    root: Root | None = None
    square: bool = False
    mean_square: bool = False
    product: tuple[Tensor, Tensor] | None = None
    site: int | None = None  # index of the norm site this is the output of


NOTHING = Facts()


@dataclass
class Site:
    """One computation found. `kind` as in README.md; `where` is file:line in the model's own code."""

    kind: str
    where: str
    function: str
    module: str
    module_class: str
    weighted: bool = False


def key(t: Tensor) -> tuple[Any, ...]:
    """Names one value while its storage is alive."""
    return (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype)


def changed(origin: Origin | None, how: str) -> Origin | None:
    """`origin` with one more change."""
    return replace(origin, changes=origin.changes | {how}) if origin else None
