"""Define reference ops: torch_npu's names and schemas in the namespace `npu_fuse`, in plain torch.

One kind of op serves every hand-off: a library op with a composite body, a fake kernel and its own
backward. It stays a call where the hand-off wants one, and is expanded by `decompositions()` where
the hand-off generates code (Inductor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "npu_fuse"
_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_bodies: dict[str, Callable[..., Any]] = {}
_expansions: dict[str, Callable[..., Any]] = {}
_keeps: dict[str, tuple[int, ...]] = {}


def define(
    schema: str, body: Callable[..., Any], keeps: tuple[int, ...] = (), *,
    fake: Callable[..., Any] | None = None, expand: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Register `schema` (name and arguments) with `body` as kernel on every device and as fake kernel.

    The body must return what it promises on fake tensors: the same shapes, dtypes and strides. `keeps`
    are the positions of the arguments that its backward needs. A body that reads values (the ends of
    groups) has a `fake` kernel of its own, and an `expand` for compilers: it returns NotImplemented
    where the op has to stay a call.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    name = schema.split("(", maxsplit=1)[0]
    _library.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or body, lib=_library)
    _bodies[name] = body
    _expansions[name] = expand or body
    _keeps[name] = keeps


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an op its own backward. It is made of ops of this namespace, so that it can be run again."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def op(name: str) -> Any:
    """`torch.ops.npu_fuse.<name>.default`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def backward_op(name: str) -> Callable[..., Any]:
    """The op that computes a backward, or its body where a second derivative is asked for (`create_graph`).

    An op of ours has one derivative only; its body is plain torch and has all.
    """
    return _bodies[name] if torch.is_grad_enabled() else op(name)


def kept_arguments(name: str) -> tuple[int, ...] | None:
    """Positions of the arguments that the op's backward keeps; None where it is no op of ours."""
    return _keeps.get(name)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every op of the namespace and its body: what `compile_fx(..., decompositions=...)` takes."""
    return {op(name): body for name, body in _expansions.items()}


def may_stay_calls() -> list[Any]:
    """The ops whose expansion may decline: a compiler needs a way to call them as they are."""
    return [op(name) for name, body in _expansions.items() if body is not _bodies[name]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Fused kernels compute in float32; the proof runs them in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sigmoid(z: torch.Tensor) -> torch.Tensor:
    """sigmoid(z); where it is derived again (`create_graph`), in a form whose slope is not s · (1 - s): that one has
    lost its digits for large z."""
    return torch.exp(torch.nn.functional.logsigmoid(z)) if torch.is_grad_enabled() else torch.sigmoid(z)


def silu_slope(z: torch.Tensor, sigmoid: torch.Tensor) -> torch.Tensor:
    """The derivative of z · sigmoid(z), `sigmoid` being sigmoid(z); 1 - sigmoid(z) has lost its digits for large z."""
    return sigmoid * (1 + z * torch.sigmoid(-z))
