"""Chips by name, and the family of CANN's documents that each belongs to."""

from __future__ import annotations

FAMILIES = {
    "910_93": "A3", "910_95": "A5", "910B": "A2", "910C": "A3", "950": "A5", "310P": "310P", "910A": "910A",
    "910Pro": "910A", "910Premium": "910A",
}  # fmt: skip
"""What a chip's name contains, and its family: A2 = Atlas A2 (910B), A3 = Atlas A3 (910_93, sold as 910C), A5 = 950
(910_95 before), 310P = "Atlas inference", 910A = "Atlas training"."""

EXAMPLES = ("Ascend910B3", "Ascend910_9391", "Ascend950", "Ascend310P3", "Ascend910A")


def family(soc: str) -> str | None:
    """The family of a chip by its name ("Ascend910B3", "910_93", "Ascend310P3"); None if it is unknown."""
    folded = soc.replace("-", "").lower()
    if folded in ("ascend910", "910"):
        return "910A"
    return next((made for part, made in FAMILIES.items() if part.lower() in folded), None)
