"""npu_moe_token_permute, npu_moe_token_unpermute and their gradients: from aclnnMoeTokenPermute(Grad) and
aclnnMoeTokenUnpermute(Grad), and from torch_npu's documents of both."""

from __future__ import annotations

from typing import Any

import torch

from npu_host_ops.register import FLOATS, check, family, kernel, unwritten

MOST = 16777215


def _check_common(op: str, dtype: torch.dtype, padded_mode: bool) -> None:
    check(op, family() in ("A2", "A3", "A5"), "the operator is not on this chip")
    check(op, dtype in FLOATS, f"the tokens are {dtype}")
    check(op, not padded_mode, "padded_mode is not supported")


def _check_indices(op: str, tokens: torch.Tensor, indices: torch.Tensor) -> int:
    """The number of experts of a token."""
    check(op, tokens.dim() >= 2, f"tokens have rank {tokens.dim()}")
    check(op, indices.dtype in (torch.int32, torch.int64), f"indices are {indices.dtype}")
    check(op, indices.dim() in (1, 2) and indices.shape[0] == tokens.shape[0],
          f"indices {tuple(indices.shape)} beside tokens {tuple(tokens.shape)}")  # fmt: skip
    check(op, indices.numel() < MOST, f"{indices.numel()} slots")
    values = indices.flatten().tolist()
    check(op, all(0 <= v < MOST for v in values), "an index is negative or too large")
    k = 1 if indices.dim() == 1 else indices.shape[1]
    check(op, k <= 512, f"{k} experts of a token")
    return k


def _map(indices: torch.Tensor) -> list[int]:
    """Slot by slot of the rows in the order of their experts, equal experts in the order of their slots."""
    flat = indices.flatten().tolist()
    return sorted(range(len(flat)), key=flat.__getitem__)


def _kept(slots: int, num_out_tokens: int | None) -> int:
    wanted = num_out_tokens or 0
    return slots if wanted == 0 else min(wanted, slots) if wanted > 0 else max(slots + wanted, 0)


@kernel
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by expert, and for each slot the row that it went to (int32)."""
    op = "npu_moe_token_permute"
    _check_common(op, tokens.dtype, padded_mode)
    k = _check_indices(op, tokens, indices)
    order = _map(indices)
    row = [0] * len(order)
    for at, slot in enumerate(order):
        row[slot] = at
    kept = order[: _kept(len(order), num_out_tokens)]
    made = tokens[torch.tensor([slot // k for slot in kept], dtype=torch.long)].contiguous()
    return made, torch.tensor(row, dtype=torch.int32)


def _token_gradient(op: str, grad: torch.Tensor, rows: torch.Tensor, count: int, dtype: torch.dtype, k: int) -> Any:
    check(op, rows.dtype == torch.int32 and rows.dim() == 1, f"sorted_indices are {rows.dtype}")
    check(op, rows.numel() == count * k, f"{rows.numel()} slots of {count} tokens with {k} each")
    check(op, grad.dtype == dtype, f"the gradient is {grad.dtype}, the tokens {dtype}")
    wide = grad.contiguous().float()
    y = torch.zeros(count, grad.shape[1])
    for j in range(k):
        at = rows[j::k].long()
        inside = at < grad.shape[0]  # slots that num_out_tokens has dropped
        y[inside] += wide[at[inside]]
    return y.to(dtype)


@kernel
def npu_moe_token_permute_grad(
    tokens: torch.Tensor, grad_permuted_tokens: torch.Tensor, indices: torch.Tensor, sorted_indices: torch.Tensor,
    padded_mode: bool = False,
) -> torch.Tensor:  # fmt: skip
    op = "npu_moe_token_permute_grad"
    _check_common(op, tokens.dtype, padded_mode)
    k = _check_indices(op, tokens, indices)
    return _token_gradient(op, grad_permuted_tokens, sorted_indices, tokens.shape[0], tokens.dtype, k)


@kernel
def npu_moe_token_permute_grad_v2(
    grad_permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, tokens_size_0: int, tokens_dtype: torch.dtype,
    num_topK: int, padded_mode: bool = False,
) -> torch.Tensor:  # fmt: skip
    op = "npu_moe_token_permute_grad_v2"
    _check_common(op, tokens_dtype, padded_mode)
    return _token_gradient(op, grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, num_topK)


def _check_unpermute(op: str, rows: torch.Tensor, count: int, probs: torch.Tensor | None, restore: Any) -> int:
    check(op, not restore or list(restore) == [1], f"restore_shape {restore} without padded_mode")
    check(op, rows.dim() == 1 and rows.dtype == torch.int32, f"sorted_indices are {rows.dtype}")
    found = rows.tolist()
    check(
        op, len(set(found)) == len(found) and all(0 <= v < len(found) for v in found), "the indices are no permutation"
    )
    if probs is None:
        return 1
    check(op, probs.dim() == 2 and probs.numel() == len(found), f"probs {tuple(probs.shape)} for {len(found)} slots")
    check(op, probs.dtype in FLOATS, f"probs are {probs.dtype}")
    check(op, probs.shape[1] <= 512, f"{probs.shape[1]} experts of a token")
    check(op, count >= len(found), f"{count} rows for {len(found)} slots")
    return probs.shape[1]


def _unpermuted(
    permuted: torch.Tensor, rows: torch.Tensor, probs: torch.Tensor | None, padded_mode: bool, restore: Any
) -> torch.Tensor:
    op = "npu_moe_token_unpermute"
    _check_common(op, permuted.dtype, padded_mode)
    check(op, family() != "A5", "this chip finalises routing instead; the stand-in does not know how")
    check(op, permuted.dim() == 2, f"permuted_tokens have rank {permuted.dim()}")
    k = _check_unpermute(op, rows, permuted.shape[0], probs, restore)
    wide = permuted.contiguous().float()
    if probs is None:
        return wide[rows.long()].to(permuted.dtype)
    y = torch.zeros(probs.shape[0], permuted.shape[1])
    for j in range(k):
        y = y + wide[rows[j::k].long()] * probs[:, j : j + 1].float()
    return y.to(permuted.dtype)


if hasattr(torch.ops.npu, "_npu_moe_token_unpermute"):  # the public operator is made of it

    @kernel
    def _npu_moe_token_unpermute(
        permuted: torch.Tensor, rows: torch.Tensor, probs: torch.Tensor | None = None, padded_mode: bool = False,
        restore_shape: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The second result is the first argument itself, which the schema does not say."""
        return _unpermuted(permuted, rows, probs, padded_mode, restore_shape), permuted

else:

    @kernel
    def npu_moe_token_unpermute(
        permuted: torch.Tensor, rows: torch.Tensor, probs: torch.Tensor | None = None, padded_mode: bool = False,
        restore_shape: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        return _unpermuted(permuted, rows, probs, padded_mode, restore_shape)


def _row_gradients(
    op: str, grad: torch.Tensor, rows: torch.Tensor, count: int, dtype: torch.dtype, probs: torch.Tensor | None,
    permuted: torch.Tensor | None, restore: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check(op, grad.dtype == dtype, f"the gradient is {grad.dtype}, the rows {dtype}")
    k = _check_unpermute(op, rows, count, probs, restore)
    wide = grad.contiguous().float()
    drows = unwritten((count, grad.shape[1]), dtype)
    if probs is None:
        drows[rows.long()] = wide.to(dtype)
        return drows, unwritten((0,), dtype)
    check(op, permuted is not None, "probs have a gradient only with permuted_tokens")
    assert permuted is not None
    dprobs = torch.empty(probs.shape)
    for j in range(k):
        at = rows[j::k].long()
        drows[at] = (wide * probs[:, j : j + 1].float()).to(dtype)
        dprobs[:, j] = (wide * permuted[at].float()).sum(1)
    return drows, dprobs.to(probs.dtype)


@kernel
def npu_moe_token_unpermute_grad(
    permuted_tokens: torch.Tensor, grad: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None = None,
    padded_mode: bool = False, restore_shape: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dpermuted, dprobs; rows that no slot names stay unwritten."""
    op = "npu_moe_token_unpermute_grad"
    _check_common(op, permuted_tokens.dtype, padded_mode)
    given = (permuted_tokens.shape[0], permuted_tokens.dtype, probs, permuted_tokens, restore_shape)
    return _row_gradients(op, grad, sorted_indices, *given)


@kernel
def npu_moe_token_unpermute_grad_v2(
    grad: torch.Tensor, sorted_indices: torch.Tensor, permuted_tokens_size_0: int, permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None = None, padded_mode: bool = False, restore_shape: Any = None,
    permuted_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    op = "npu_moe_token_unpermute_grad_v2"
    _check_common(op, permuted_tokens_dtype, padded_mode)
    given = (permuted_tokens_size_0, permuted_tokens_dtype, probs, permuted_tokens, restore_shape)
    return _row_gradients(op, grad, sorted_indices, *given)
