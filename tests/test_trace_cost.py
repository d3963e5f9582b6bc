"""What is found to be no rotation costs little: linear attention unrolls a recurrence of row times matrix."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import npu_fuse
from npu_fuse.trace import Tracer

STEPS = 24


def _recurrence(attention: torch.Tensor) -> torch.Tensor:
    attention = attention.clone()
    for i in range(1, STEPS):
        row, above = attention[..., i, :i].clone(), attention[..., :i, :i].clone()
        attention[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return attention


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_sum_over_many_elements_is_not_followed(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[int] = []
    leaf = Tracer.leaf

    def counted(self: Tracer, shape: Sequence[int]) -> torch.Tensor:
        followed.append(int(torch.Size(shape).numel()))
        return leaf(self, shape)

    monkeypatch.setattr(Tracer, "leaf", counted)
    attention = torch.randn(3, 2, 1, STEPS, STEPS)
    npu_fuse.clear_reports()
    torch._dynamo.reset()
    compiled = torch.compile(_recurrence, backend="npu_fuse", dynamic=dynamic, options={"handoff": "eager"})
    assert torch.allclose(compiled(attention), _recurrence(attention))
    assert sum(followed) < 8 * attention.numel()  # steps of two and four elements alone


def test_a_row_times_its_own_matrix_is_no_rotation() -> None:
    """Two products of two elements each, as in a rotation of width 2, and its op would cost more than they do."""
    report = npu_fuse.explain(_recurrence, torch.randn(3, 2, 1, STEPS, STEPS))
    assert [site for graph in report.graphs for site in graph.sites] == []
