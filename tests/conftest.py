"""Suites that compile thousands of small functions are slow by their folder, however their files grow."""

from __future__ import annotations

from pathlib import Path

import pytest

SLOW = ("rules", "soundness", "test_engine_faults.py", "test_engine_regions.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in SLOW:
            item.add_marker(pytest.mark.slow)
