"""Verdicts on disk: one JSON file for each structure, in a folder that the user names.

Files are data, never code; they are written atomically and read with every field checked. A folder
that cannot be written or a file that cannot be read is a warning, and the proof is made anew.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from npu_fuse.cache_tag import source_hash
from npu_fuse.options import Options
from npu_fuse.prove import Verdict
from npu_fuse.report import ProofFacts

logger = logging.getLogger("npu_fuse")


@dataclass(frozen=True)
class DiskCache:
    """Verdicts by structure key, valid for one state of npu_fuse's sources."""

    folder: Path
    tag: str

    def load(self, key: str) -> Verdict | None:
        path = self._path(key)
        try:
            return _verdict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as problem:
            _warn(f"the kept proof {path.name} cannot be read ({problem}); it is made anew")
            return None

    def store(self, key: str, verdict: Verdict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".proof-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(verdict), file)
            os.replace(name, self._path(key))
        except OSError as problem:
            _warn(f"proofs cannot be kept in {self.folder} ({problem}); set the option proof_cache to another folder")

    def _path(self, key: str) -> Path:
        return self.folder / f"{self.tag}-{key}.json"


def disk_cache(options: Options) -> DiskCache | None:
    if options.proof_cache is None:
        return None
    return DiskCache(Path(options.proof_cache), source_hash()[:16])


def _verdict(data: dict[str, object]) -> Verdict:
    """Raises ValueError, TypeError or KeyError where the data is no verdict."""
    facts = data["facts"]
    if not isinstance(facts, dict) or not isinstance(data["holds"], bool) or not isinstance(data["notes"], list):
        raise ValueError("a field has another type")
    for name, value in facts.items():
        if not isinstance(value, (bool, int, float, type(None))):
            raise ValueError(f"{name} is no number")
    return Verdict(
        data["holds"], str(data["reason"]), ProofFacts(**facts), str(data["form"]), tuple(str(n) for n in data["notes"])
    )


@functools.lru_cache(maxsize=64)
def _warn(message: str) -> None:
    logger.warning("%s", message)
