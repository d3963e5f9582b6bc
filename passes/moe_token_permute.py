"""Rows in the order of their experts: tokens [T, H], indices [T, k] or [S]  →  npu_moe_token_permute.

permuted [T·k, H] holds tokens[order // k], order being the stable sort of the flat indices; sorted_indices [T·k]
(int32) says in which row each slot went. Semantics: torch_npu's document of npu_moe_token_permute; the gradient
sums a token's k rows in float32 with one rounding (aclnnMoeTokenPermuteGrad).
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse import ops

NAME = "moe_token_permute"


def _forward(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    if padded_mode or num_out_tokens not in (None, 0):
        raise NotImplementedError("npu_moe_token_permute drops and pads no tokens here; leave both arguments out")
    k = 1 if indices.dim() == 1 else indices.shape[1]
    order = torch.sort(indices.reshape(-1), stable=True).indices
    slots = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    inverse = torch.zeros_like(slots).scatter(0, order, slots)
    return tokens[order // k], inverse


def _backward_op(
    tokens: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor, sorted_indices: torch.Tensor,
    padded_mode: bool = False,
) -> torch.Tensor:  # fmt: skip
    rows = grad[sorted_indices]
    k = 1 if indices.dim() == 1 else indices.shape[1]
    if k == 1:
        return rows
    wide = rows.reshape(tokens.shape[0], k, tokens.shape[1]).to(ops.compute_dtype(grad.dtype))
    return wide.sum(1).to(tokens.dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1], output[1])
    ctx.shape = inputs[0].shape
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> Any:
    if grad is None:
        return None, None, None, None
    indices, inverse = ctx.saved_tensors
    tokens = grad.new_empty(1).expand(ctx.shape)  # its shape is read, nothing else
    return ops.backward_op("npu_moe_token_permute_grad")(tokens, grad, indices, inverse), None, None, None


ops.define(
    "npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False)"
    " -> (Tensor, Tensor)",
    _forward, keeps=(1,),
)  # fmt: skip
ops.define(
    "npu_moe_token_permute_grad(Tensor tokens, Tensor grad_permuted_tokens, Tensor indices, Tensor sorted_indices,"
    " bool padded_mode=False) -> Tensor",
    _backward_op,
)
ops.differentiable("npu_moe_token_permute", _backward, _setup)
