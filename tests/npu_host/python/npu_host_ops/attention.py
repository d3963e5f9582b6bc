"""npu_fusion_attention_v3, which torch_npu calls for scaled_dot_product_attention: layout BNSD, no dropout."""

from __future__ import annotations

from typing import Any

import torch

from npu_host_ops.register import check, kernel, unwritten

LANES = 8  # softmax_max and softmax_sum are written eight wide
NAME = "npu_fusion_attention_v3"


def _taken(op: str, q: torch.Tensor, k: torch.Tensor, layout: str, heads: int, keep_prob: float, mode: int,
           given: Any) -> None:  # fmt: skip
    check(op, layout == "BNSD", f"the stand-in takes layout BNSD only, not {layout}")
    check(op, keep_prob == 1.0, "the stand-in has no dropout")
    check(op, mode in (0, 1, 2, 3), f"the stand-in has no sparse_mode {mode}")
    check(op, not any(v is not None for v in given), "the stand-in takes no pse, padding mask, prefix, lengths or sink")
    check(op, q.dtype in (torch.float16, torch.bfloat16, torch.float32), f"query is {q.dtype}")
    check(op, q.dim() == 4 and q.shape[1] == heads and heads % k.shape[1] == 0, f"heads of {tuple(q.shape)}")


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, mode: int) -> torch.Tensor:
    """[B, N, S, T] in float32; True in the mask is what is left out. 2 and 3 are causal from the upper left and the
    lower right, whatever the (compressed) mask holds."""
    groups = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(groups, 1).mT * scale
    rows, columns = scores.shape[-2:]
    if mode in (2, 3):
        shift = 0 if mode == 2 else columns - rows
        mask = torch.ones(rows, columns, dtype=torch.bool).triu(1 + shift)
    return scores if mask is None else scores.masked_fill(mask.bool(), torch.finfo(torch.float32).min)


@kernel
def npu_fusion_attention_v3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int, input_layout: str,
    pse: Any = None, padding_mask: Any = None, atten_mask: torch.Tensor | None = None, scale: float = 1.0,
    keep_prob: float = 1.0, pre_tockens: int = 0, next_tockens: int = 0, inner_precise: int = 0, prefix: Any = None,
    actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q [B, N, S, D], k and v [B, M, T, D] → y [B, N, S, D]; statistics in float32, one rounding of y."""
    given = (pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink)
    _taken(NAME, query, key, input_layout, head_num, keep_prob, sparse_mode, given)
    scores = _scores(query, key, atten_mask, scale, sparse_mode)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    groups = query.shape[1] // key.shape[1]
    y = (weights / total) @ value.float().repeat_interleave(groups, 1)
    lanes = (*query.shape[:3], LANES)
    seed, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    rest = unwritten((0,), query.dtype)
    return y.to(query.dtype), top.expand(lanes).contiguous(), total.expand(lanes).contiguous(), rest, seed, offset


@kernel
def npu_fusion_attention_grad_v3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dy: torch.Tensor, head_num: int, input_layout: str,
    *, pse: Any = None, padding_mask: Any = None, atten_mask: torch.Tensor | None = None, softmax_max: Any = None,
    softmax_sum: Any = None, softmax_in: Any = None, attention_in: Any = None, scale_value: float = 1.0,
    keep_prob: float = 1.0, pre_tockens: int = 0, next_tockens: int = 0, inner_precise: int = 0, seed: Any = None,
    offset: Any = None, prefix: Any = None, actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dy [B, N, S, D] → the gradients to q, k and v, from the forward's own maximum and sum."""
    op = "npu_fusion_attention_grad_v3"
    given = (pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink)
    _taken(op, query, key, input_layout, head_num, keep_prob, sparse_mode, given)
    groups = query.shape[1] // key.shape[1]
    scores = _scores(query, key, atten_mask, scale_value, sparse_mode)
    weights = (scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    wide_k, wide_v = (t.float().repeat_interleave(groups, 1) for t in (key, value))
    dweights = dy.float() @ wide_v.mT
    dscores = weights * (dweights - (dy.float() * attention_in.float()).sum(-1, keepdim=True)) * scale_value
    dq, dk, dv = dscores @ wide_k, dscores.mT @ query.float(), weights.mT @ dy.float()

    def fold(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (key.shape[1], groups)).sum(2)

    made = dq.to(query.dtype), fold(dk).to(key.dtype), fold(dv).to(value.dtype)
    return *made, unwritten((0,), query.dtype), unwritten((0,), query.dtype)
