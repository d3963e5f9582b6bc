"""The stand-in itself: memory, views, captures. What it got wrong here would make every other test worthless."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = pytest.mark.real_wheel

RELEASE = os.environ.get("NPU_HOST", "").rpartition("torch_npu-")[2]


def test_the_wheel_is_the_unmodified_one() -> None:
    import torch_npu

    assert torch.npu.is_available() and torch.npu.get_device_name() == "Ascend910B3"
    assert torch_npu.__version__.split("+")[0] == RELEASE
    assert RELEASE.split(".")[:2] == torch.__version__.split(".")[:2]
    assert torch.ones(2, device="npu").device == torch.device("npu:0")


def test_views_share_memory_and_keep_strides() -> None:
    x = torch.randn(3, 4).npu()
    want = x.cpu()
    x.t()[1].add_(1)
    x[1:, ::2].mul_(2)
    want.t()[1].add_(1)
    want[1:, ::2].mul_(2)
    assert torch.equal(x.cpu(), want)
    for made in (x.t().clone(), x.t().contiguous(), x.t().to(torch.float16), (x.t() + 1), torch.empty_like(x.t())):
        assert made.device.type == "npu"
    assert x.t().clone().stride() == (1, 4) and x.t().contiguous().stride() == (3, 1)
    other = torch.empty(4, 3, device="npu")
    other.copy_(x.t())
    assert torch.equal(other.cpu(), want.t())


def test_out_arguments_grow() -> None:
    x, out = torch.randn(3, 4).npu(), torch.empty(0, device="npu")
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), x.cpu() + 1)
    given = torch.empty(4, 3, device="npu").t()
    torch.add(x, 1, out=given)
    assert given.stride() == (1, 3) and torch.equal(given.cpu(), x.cpu() + 1)


def test_unwritten_memory_is_nan() -> None:
    torch.ones(100, device="npu")
    assert torch.empty(100, device="npu").isnan().all()


def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="npu") + torch.ones(3)


def test_a_capture_runs_nothing_and_a_replay_everything() -> None:
    x, count = torch.randn(4, 8).npu(), torch.zeros(1, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = torch.softmax(x.relu().view(2, 16), -1).t()
        count.add_(1)
    assert count.item() == 0
    for factor in (1.0, 2.0):
        x.mul_(factor)
        graph.replay()
        assert torch.equal(y, torch.softmax(x.relu().view(2, 16), -1).t())
    assert count.item() == 2


def test_reading_on_the_host_breaks_a_capture() -> None:
    x = torch.ones(2, device="npu")
    with pytest.raises(RuntimeError, match="during a capture"), torch.npu.graph(torch.npu.NPUGraph()):
        x.sum().item()


def test_matmul_gradients() -> None:
    for left, right in (((4,), (4,)), ((3, 4), (4,)), ((4,), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5))):
        a, b = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
        pairs = [[t.detach().to(d).requires_grad_() for t in (a, b)] for d in ("cpu", "npu")]
        for p, q in pairs:
            (p @ q).square().sum().backward()
        for host, device in zip(*pairs, strict=True):
            torch.testing.assert_close(device.grad.cpu(), host.grad)


def test_counts() -> None:
    import npu_host_ops

    x = torch.ones(4, 8, device="npu")
    npu_host_ops.reset_counts()
    _ = (x + x).t()
    assert npu_host_ops.counts() == {"aten::add.Tensor": npu_host_ops.Count(1, 128, 128)}
