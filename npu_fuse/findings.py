"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One fact. `code` is stable; `remedy` is empty where there is nothing to do."""

    code: str
    level: Level
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:7} {self.code}: {self.message}" + (f" → {self.remedy}" if self.remedy else "")
