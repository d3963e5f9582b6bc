"""Tokens to their experts and back: permute, grouped matmuls, unpermute, each an op of the NPU's.

Two spellings: rows sorted by expert with `torch._grouped_mm` (the whole block, from the tokens to the weighted
sum), and weights gathered for each slot with `bmm` (up to the experts' rows). Where the block is not one, its
grouped matmuls are sites of their own.
"""

from __future__ import annotations

from typing import Any

from npu_fuse import dialect as d
from npu_fuse.emit import Emitter
from npu_fuse.expert_blocks import block_of, sorted_chains
from npu_fuse.expert_rows import Chain, chains
from npu_fuse.expert_sites import Matmul, block_site, site_of
from npu_fuse.limits import on_npu
from npu_fuse.passes import grouped_matmul
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
    for chain in chains(view):
        found.append(site_of(view, NAME, chain, _matmul(chain), _trained(chain)))
    return found


def _trained(chain: Chain) -> bool:
    result = d.tensor(chain.out)
    return result is not None and result.requires_grad


def _matmul(chain: Chain) -> Matmul:
    trained = _trained(chain)

    def matmul(e: Emitter, rows: Any, weight: Any, ends: Any) -> Any:
        return grouped_matmul.call(e, rows, weight, ends, trained, zero_rest=False)

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
