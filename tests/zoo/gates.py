"""Activations that are written out as products, and the gates made with any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from . import checks
from .facts import Facts


def activation(x: Tensor, fx: Facts, y: Tensor, fy: Facts, facts: Callable[[Tensor], Facts]) -> Facts | None:
    """Facts of x · y if that is an activation: x · sigmoid(alpha · x), or x times gelu's own factor."""
    if fy.inner is None or x.shape != y.shape:
        return None
    function, argument = fy.inner
    if function == "sigmoid":
        alpha = checks.sigmoid_scale(x, argument)
        if alpha is not None:
            alone = abs(alpha - 1) < checks.TOLERANCE
            return Facts(origin=fx.origin, activation="silu" if alone else "silu_alpha")
        inside = facts(argument).origin
        if fx.origin and inside and fx.origin.uid == inside.uid:
            return Facts(origin=fx.origin, activation="silu_changed")
    elif function in ("tanh", "erf") and checks.is_gelu_factor(x, y):
        origin = replace(fx.origin, changes=fx.origin.changes - {"scale"}) if fx.origin else None
        return Facts(origin=origin, activation="gelu")
    return None


def kind(fx: Facts, fy: Facts, classes: Sequence[str]) -> str | None:
    """What act(gate) · up is; None if x is no activation of a projection, or y another or a weight.

    `classes` are the innermost modules that are running: experts are told apart by their name only, which
    changes the kind and not the count.
    """
    if fx.activation is None or fx.origin is None or fy.activation is not None or fy.constant:
        return None
    if fy.origin is None or "conv" in (fx.origin.operation, fy.origin.operation):
        return "act_gate_other"
    if (fx.origin.changes | fy.origin.changes) - {"clamp", "scale"}:
        return "swiglu_modified"
    if fx.activation == "gelu":
        return "geglu"
    if fx.activation != "silu":
        return "swiglu_modified"
    return "swiglu_in_experts" if any("expert" in name.lower() for name in classes) else "swiglu"
