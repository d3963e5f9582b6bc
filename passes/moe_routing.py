"""Tokens to their experts and back: permute, grouped matmuls, unpermute, each an op of the NPU's.

Two spellings: rows sorted by expert with `torch._grouped_mm` (the whole block, from the tokens to the weighted
sum), and weights gathered for each slot with `bmm` (up to the experts' rows). Where the block is not one, its
grouped matmuls are sites of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.emit import Emitter
from npu_fuse.expert_blocks import block_of, sorted_chains
from npu_fuse.expert_branches import branch_blocks
from npu_fuse.expert_dense import dense_blocks
from npu_fuse.expert_rows import Chain, Product, chains
from npu_fuse.expert_sites import Matmul, block_site, site_of
from npu_fuse.limits import on_npu
from npu_fuse.passes import grouped_linear, grouped_matmul
from npu_fuse.report import Status
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View

NAME = "moe_routing"
MAX_K = 512


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for chain in sorted_chains(view):
        block = block_of(view, chain)
        if isinstance(block, str):
            found.append(Miss(NAME, chain.products[0].out, "moe_routing.block", block))
        else:
            found.append(block_site(view, NAME, block, _matmul(chain), _trained(chain)))
    for dense in (*branch_blocks(view), *dense_blocks(view)):
        if isinstance(dense, tuple):
            found.append(Miss(NAME, dense[0], "moe_routing.branches", dense[1]))
        else:
            found.append(block_site(view, NAME, dense, _matmul(dense.chain), _trained(dense.chain)))
    for chain in chains(view):
        found.append(site_of(view, NAME, chain, _matmul(chain), _trained(chain)))
    return found


def _trained(chain: Chain) -> bool:
    result = d.tensor(chain.out)
    return result is not None and result.requires_grad


def _matmul(chain: Chain) -> Matmul:
    trained = _trained(chain)

    def matmul(e: Emitter, product: Product, rows: Any, env: Mapping[Node, Any], ends: Any) -> Any:
        if product.listed:
            weights, biases = [env[w] for w in product.weights], [env[b] for b in product.biases]
            return grouped_linear.call(e, rows, weights, biases, ends, product.turned, trained, product.zero_rest)
        weight = env[product.weight]
        weight = e.call(torch.transpose, weight, 1, 2) if product.turned else weight
        return grouped_matmul.call(e, rows, weight, ends, trained, product.zero_rest)

    return matmul


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """Those of grouped matmuls; npu_moe_token_permute and unpermute: chips, k (their aclnn documents)."""
    tokens = d.tensor(site.inputs[0])
    if target.name != "npu" or tokens is None:
        return None
    refused = on_npu(NAME, target, ("npu_moe_token_permute", "npu_moe_token_unpermute"), tokens.dtype)
    k = site.params.get("k", "1")
    if refused is None and k.isdigit() and int(k) > MAX_K:
        reason = f"npu_moe_token_unpermute takes at most {MAX_K} experts of a token, here are {k}"
        refused = Refusal(Status.REFUSED_BY_TARGET, "moe_routing.k", reason)
    return refused or grouped_matmul.limits(site, form, target)


RULE = Rule(NAME, recognise, limits, first=True)
