"""Sites that truth counts and no fused operation computes: architecture -> op -> (how many, why). Data only."""

from __future__ import annotations

_SOFTCAP = "the gate is soft-capped by tanh inside silu: no fused operation has that"

_STATISTIC = "only the inverse root is used, on a product of its own: the op's output would be read by nobody"

_CLAMPED = "silu's result is clamped: the fused operation clamps its argument"

UNFUSABLE: dict[str, dict[str, tuple[int, str]]] = {
    "hy_v4": {"rms_norm": (7, _STATISTIC)},
    "inkling2_text": {"glu": (2, _SOFTCAP)},
    "itt:inkling2": {"glu": (2, _SOFTCAP)},
    "itt:step3p7": {"glu": (6, _CLAMPED)},
}
