"""Launches of a decoder layer, counted below the wheel: what a user's NPU would be asked to do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from npu_fuse import aliasing

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


def strict_about_schemas() -> contextlib.AbstractContextManager[object]:
    """torch as it is where the variable CI is set: an operator whose schema hides an alias is an error."""
    config = torch._functorch.config
    if not hasattr(config, aliasing.RAISES):
        return contextlib.nullcontext()
    return config.patch(aliasing.RAISES, True)


BLOCK_AT_MOST = 9
"""Of Qwen3-MoE's experts: router, its op, permute, two for the ends of groups, two matmuls, a gate, unpermute."""


def test_a_block_of_qwen3_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    import npu_launches

    with strict_about_schemas():
        launches = npu_launches.measure_experts("qwen3_moe")["launches"]
    assert launches["npu_fuse"] <= BLOCK_AT_MOST < launches["router apart"] < launches["eager"]
