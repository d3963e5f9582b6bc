"""Launches of a decoder layer, counted below the wheel: what a user's NPU would be asked to do."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.real_wheel

AT_MOST = 18
"""Of a Qwen3 layer in npugraph_ex's graph: seven matmuls, attention, four norms, two rotations, a gate, and three more:
gate and up are concatenated, attention's result is made dense, its mask is negated."""


def test_a_qwen3_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    import npu_launches

    row = npu_launches.measure("qwen3", False)
    assert row["launches"]["npu_fuse"] <= min(AT_MOST, row["bound"]) < row["launches"]["hand-off"] / 2
    assert row["bytes"]["npu_fuse"] < row["bytes"]["hand-off"]
