"""Sites that truth counts and no fused operation computes: architecture -> op -> (how many, why). Data only."""

from __future__ import annotations

_SOFTCAP = "the gate is soft-capped by tanh inside silu: no fused operation has that"

UNFUSABLE: dict[str, dict[str, tuple[int, str]]] = {
    "inkling2_text": {"glu": (2, _SOFTCAP)},
    "itt:inkling2": {"glu": (2, _SOFTCAP)},
}
