"""A token's rows back together: permuted [S, H], sorted_indices [T·k], probs [T, k]  →  npu_moe_token_unpermute.

y [T, H] = Σ_j probs[t, j] · permuted[sorted_indices[t·k + j]], products and sum in float32 in the order of j, one
rounding. Without probs k is 1: rows in the order of the slots. Semantics: torch_npu's document of
npu_moe_token_unpermute and aclnnMoeTokenUnpermute.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse import ops

NAME = "moe_token_unpermute"


def _wide(permuted: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The rows of each token [T, k, H], in the dtype of the kernel's sum."""
    rows = permuted[sorted_indices].to(ops.compute_dtype(permuted.dtype))
    return rows.reshape(*probs.shape, permuted.shape[1])


def _forward(
    permuted: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None = None, padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    if padded_mode or restore_shape:
        raise NotImplementedError("npu_moe_token_unpermute pads nothing here; leave both arguments out")
    if probs is None:
        return permuted[sorted_indices]
    wide = _wide(permuted, sorted_indices, probs)
    return (wide * probs.to(wide.dtype).unsqueeze(-1)).sum(1).to(permuted.dtype)


def _backward_op(
    permuted: torch.Tensor, dy: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None = None,
    padded_mode: bool = False, restore_shape: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if probs is None:
        return _scattered(dy, permuted, sorted_indices), dy.new_empty(0)
    wide = _wide(permuted, sorted_indices, probs)
    given = dy.to(wide.dtype).unsqueeze(1)
    drows = (given * probs.to(wide.dtype).unsqueeze(-1)).to(permuted.dtype)
    dprobs = (wide * given).sum(-1).to(probs.dtype)
    return _scattered(drows.reshape(-1, permuted.shape[1]), permuted, sorted_indices), dprobs


def _scattered(rows: torch.Tensor, permuted: torch.Tensor, sorted_indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(permuted, dtype=rows.dtype).index_put((sorted_indices,), rows)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    permuted, sorted_indices, probs = inputs[:3]
    ctx.given = probs is not None
    ctx.shape = permuted.shape
    ctx.save_for_backward(sorted_indices, *((permuted, probs) if probs is not None else ()))


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    sorted_indices, *kept = ctx.saved_tensors
    permuted = kept[0] if kept else dy.new_empty(1).expand(ctx.shape)  # its shape is read, nothing else
    probs = kept[1] if kept else None
    back = ops.backward_op("npu_moe_token_unpermute_grad")
    drows, dprobs = back(permuted, dy.contiguous(), sorted_indices, probs)
    return drows, None, dprobs if ctx.given else None, None, None


ops.define(
    "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None,"
    " bool padded_mode=False, int[]? restore_shape=None) -> Tensor",
    _forward, keeps=(0, 1, 2),
)  # fmt: skip
ops.define(
    "npu_moe_token_unpermute_grad(Tensor permuted_tokens, Tensor grad_unpermuted_tokens, Tensor sorted_indices,"
    " Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None) -> (Tensor, Tensor)",
    _backward_op,
)
ops.differentiable("npu_moe_token_unpermute", _backward, _setup)
