"""Grouped matmul with a list of weights: rows of group e times weight e, plus bias e  →  npu_grouped_matmul.

x [S, K] sorted by expert, E weights [K, N] (or [N, K], `turned`, as linear layers keep them: passed as transposed
views, no copy), biases: none or E of [N], ends [E] of the groups, y [S, N] in x's dtype. Nothing is stacked.
Semantics: torch_npu's document of npu_grouped_matmul (lists of up to 128 weights), aclnnGroupedMatmul.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse import dialect as d
from npu_fuse import ops
from npu_fuse.emit import Emitter, item
from npu_fuse.passes.grouped_matmul import by_list

NAME = "grouped_linear"


def _forward(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], ends: torch.Tensor, turned: bool,
    zero_rest: bool,
) -> torch.Tensor:  # fmt: skip
    """y [S, N]; rows of no group are zeros with `zero_rest`, else anything."""
    if x.device.type == "npu":
        given = [w.t() for w in weights] if turned else weights
        wide = [b.float() if x.dtype is torch.bfloat16 else b for b in biases] or None  # bf16 rows want f32 biases
        y: torch.Tensor = torch.ops.npu.npu_grouped_matmul.default(
            [x], given, bias=wide, group_list=ends.to(torch.int64), split_item=2, group_type=0, group_list_type=0
        )[0]
        rest = torch.arange(y.shape[0], device=y.device) >= ends[-1]
        return y.masked_fill(rest.unsqueeze(1), 0) if zero_rest else y
    return by_list(x, weights if turned else [w.t() for w in weights], biases, ends)


def _fake(x: Any, weights: Any, biases: Any, ends: Any, turned: bool, zero_rest: bool) -> torch.Tensor:
    made: torch.Tensor = x.new_empty(x.shape[0], weights[0].shape[0 if turned else 1])
    return made


def _expand(*_: Any) -> Any:
    """Compilers keep the call: they have no grouped matmul of a list."""
    return NotImplemented


def _bias_gradient(dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """dy [S, N], ends [E] → [E, N]: sums over the rows of each group, in float32, one rounding."""
    rows = torch.arange(dy.shape[0], device=dy.device)
    expert = torch.searchsorted(ends.to(rows.dtype), rows, right=True)
    wide = dy.to(ops.compute_dtype(dy.dtype))
    sums = wide.new_zeros(ends.shape[0] + 1, dy.shape[1]).index_add(0, expert, wide)  # the last: rows of no group
    return sums[:-1].to(dy.dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, biases, ends, ctx.turned, ctx.zero_rest = inputs
    ctx.biases, ctx.experts = len(biases), len(weights)
    ctx.save_for_backward(x, ends, *weights)


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    x, ends, *weights = ctx.saved_tensors
    dy = dy.contiguous()
    dx = None
    dw: list[torch.Tensor | None] = [None] * ctx.experts
    db: list[torch.Tensor | None] = [None] * ctx.biases
    if ctx.needs_input_grad[0]:
        dx = ops.backward_op(NAME)(dy, weights, [], ends, not ctx.turned, ctx.zero_rest)
    if any(ctx.needs_input_grad[1]):
        gradient = ops.backward_op("grouped_matmul_weight_gradient")
        dw = list((gradient(dy, x, ends) if ctx.turned else gradient(x, dy, ends)).unbind())
    if ctx.biases and any(ctx.needs_input_grad[2]):
        db = list(ops.backward_op("grouped_linear_bias_gradient")(dy, ends).unbind())
    return dx, dw, db, None, None, None


ops.define(
    "grouped_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor ends, bool turned, bool zero_rest) -> Tensor",
    _forward, keeps=(0, 1, 3), fake=_fake, expand=_expand,
)  # fmt: skip
ops.define("grouped_linear_bias_gradient(Tensor dy, Tensor ends) -> Tensor", _bias_gradient)
ops.differentiable(NAME, _backward, _setup)


def call(e: Emitter, rows: Any, weights: list[Any], biases: list[Any], ends: Any, turned: bool, trained: bool,
         zero_rest: bool) -> Any:  # fmt: skip
    """The NPU's own op in inference; with a gradient, or zeros to write, ours around it."""
    if e.target.name == "npu":
        rows = e.dense(rows)
        if not trained and not zero_rest:
            given = [e.call(torch.Tensor.t, w) for w in weights] if turned else weights
            found = d.tensor(rows) if not isinstance(rows, torch.Tensor) else rows
            wide = found is not None and found.dtype is torch.bfloat16  # bf16 rows want f32 biases
            added = [e.cast(b, torch.float32) if wide else b for b in biases]
            made = e.fused(
                "npu_grouped_matmul", [rows], given, bias=added or None, group_list=ends, split_item=2, group_type=0,
                group_list_type=0,
            )  # fmt: skip
            return item(e, made, 0)
    return e.fused(NAME, rows, weights, biases, ends, turned, zero_rest)
