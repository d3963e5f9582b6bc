"""Bytes kept for backward: never more than the hand-off alone keeps (bench/memory.py measures whole models)."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

import npu_fuse

D, WIDE, T, HEADS = 64, 96, 16, 4


class Block(torch.nn.Module):
    """A decoder's parts, with gamma = 1 + w as some models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(D))
        self.gate, self.up, self.down = (torch.nn.Linear(*s, bias=False) for s in ((D, WIDE), (D, WIDE), (WIDE, D)))
        self.q = torch.nn.Linear(D, D, bias=False)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + self.w.float())).type_as(x)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q = self.q(self.norm(x)).view(*x.shape[:-1], HEADS, D // HEADS).transpose(1, 2)
        half = q.shape[-1] // 2
        q = q * cos + torch.cat((-q[..., half:], q[..., :half]), -1) * sin
        x = x + q.transpose(1, 2).reshape(x.shape)
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def kept(backend: str, dtype: torch.dtype, autocast: bool) -> int:
    """Bytes that autograd is handed in one forward pass, parameters and inputs left out."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block().to(dtype)
    x = torch.randn(2, T, D, dtype=dtype, requires_grad=True)
    cos, sin = torch.randn(2, T, D // HEADS, dtype=dtype).unbind(0)
    options = {"handoff": "aot_eager"} if backend == "npu_fuse" else None
    compiled = torch.compile(block, backend=backend, options=options)
    region = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), x, cos, sin)}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with region:
        compiled(x, cos, sin).float().sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = compiled(x, cos, sin)
    total = sum(found.values())
    out.float().sum().backward()
    return total


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]
)
def test_no_more_is_kept_than_without(dtype: torch.dtype, autocast: bool) -> None:
    plain = kept("aot_eager", dtype, autocast)
    npu_fuse.clear_reports()
    fused = kept("npu_fuse", dtype, autocast)
    assert sum(report.count(npu_fuse.Status.FUSED) for report in npu_fuse.reports()) == 4
    assert fused <= plain, f"{fused} bytes, {plain} without npu_fuse"
