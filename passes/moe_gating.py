"""A router's choice: logits x [T, E]  →  weights [T, k] and experts [T, k], one op.

npu_moe_gating_top_k_softmax: the k largest of softmax(x). npu_moe_gating_top_k_softmax_v2, renorm 1: softmax of the k
largest of x, which is also softmax(x) chosen from and normalised. npu_moe_gating_top_k: softmax or sigmoid s of x in
float32; experts by s + bias within the chosen groups (by their largest, or the sum of their two largest); weights
from s: for a sigmoid s / (Σs + eps), then · routed_scaling_factor. Weights in x's dtype, experts int32.
Semantics: torch_npu's documents of the three, aclnnMoeGatingTopK and aclnnMoeGatingTopKSoftmaxV2.

Which of several tied experts is taken is unspecified in torch and in the ops alike: proofs run on scores without
ties, and a trained router is left alone unless the option moe_gating="always" asks for it (another run, or the
recomputation of a checkpointed block, might route otherwise). Then the op chooses and torch computes the weights:
torch_npu's ops have no backward that can be traced.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import ops
from npu_fuse.limits import on_npu
from npu_fuse.report import Status
from npu_fuse.router_forms import GATED, SOFT, forms, launches_saved, ways
from npu_fuse.router_probes import untied_logits
from npu_fuse.routers import Router, nodes_of, routers
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site, StandIn
from npu_fuse.targets import Target
from npu_fuse.view import View, static

NAME = "moe_gating"
MAX_EXPERTS = 2048
MAX_K = 1024
TIES = "which of several tied experts is taken is unspecified in the code and in the op: they may differ"


# --- the ops ---------------------------------------------------------------------------------------


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(ops.compute_dtype(x.dtype))


def _softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The third result numbers the slots column by column."""
    y, experts = torch.topk(torch.softmax(_wide(x), -1), k, -1)
    rows = y[..., 0].numel()
    slots = torch.arange(rows * k, dtype=torch.int32, device=x.device).reshape(k, rows).t()
    return y.to(x.dtype), experts.int(), slots.reshape(y.shape).contiguous()


def _softmax_v2(
    x: torch.Tensor, *, k: int = 1, finished: torch.Tensor | None = None, renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    wide = _wide(x)
    if renorm:
        y, experts = torch.topk(wide, k, -1)
        return torch.softmax(y, -1).to(x.dtype), experts.int(), wide.new_empty(0)
    scores = torch.softmax(wide, -1)
    y, experts = torch.topk(scores, k, -1)
    return y.to(x.dtype), experts.int(), scores if output_softmax else wide.new_empty(0)


def _gating(
    x: torch.Tensor, k: int, *, bias: torch.Tensor | None = None, input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None, k_group: int = 1, group_count: int = 1, group_select_mode: int = 0,
    renorm: int = 0, norm_type: int = 0, out_flag: bool = False, routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    wide = _wide(x)
    scores = torch.sigmoid(wide) if norm_type else torch.softmax(wide, -1)
    chosen = scores if bias is None else scores + bias.to(scores.dtype)
    if group_count > 1:
        grouped = chosen.reshape(chosen.shape[0], group_count, -1)
        best = grouped.topk(2, -1).values.sum(-1) if group_select_mode else grouped.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(k_group, -1).indices, True)
        chosen = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).reshape(chosen.shape)
    experts = torch.topk(chosen, k, -1).indices
    y = scores.gather(-1, experts)
    y = y / (y.sum(-1, keepdim=True) + eps) if norm_type else y
    return (y * routed_scaling_factor).to(x.dtype), experts.int(), scores if out_flag else torch.empty_like(scores)


ops.define(
    "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1) -> (Tensor, Tensor, Tensor)", _softmax
)
ops.define(
    "npu_moe_gating_top_k_softmax_v2(Tensor x, *, int k=1, Tensor? finished=None, int? renorm=0,"
    " bool? output_softmax=False) -> (Tensor, Tensor, Tensor)",
    _softmax_v2,
)
ops.define(
    "npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None,"
    " int k_group=1, int group_count=1, int group_select_mode=0, int renorm=0, int norm_type=0, bool out_flag=False,"
    " float routed_scaling_factor=1., float eps=9.9999999999999995e-21) -> (Tensor, Tensor, Tensor)",
    _gating,
)


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    return [
        Miss(NAME, top, f"{NAME}.router", router) if isinstance(router, str) else _site(view, router)
        for top, router in routers(view)
    ]


def _site(view: View, router: Router) -> Site | Miss:
    choice, x, result = router.choice, d.tensor(router.choice.x), d.tensor(router.output)
    assert x is not None and result is not None
    experts = static(x.shape[-1])
    if experts is None:
        return Miss(NAME, router.topk, f"{NAME}.experts", "the number of experts is symbolic")
    trained = result.requires_grad
    written = ways(view, router, trained)
    made, launches = forms(router, written, x.dtype, result.dtype)
    if not made:
        return Miss(NAME, router.topk, f"{NAME}.form", "no op computes these weights of these scores")
    nodes = nodes_of(view, router)
    bias = d.tensor(choice.bias)
    params = {"scores": choice.kind, "experts": str(experts), "k": str(router.k)}
    if choice.groups is not None:
        how = "sums of two" if choice.groups.pairs else "largest"
        params["groups"] = f"{choice.groups.kept} of {choice.groups.count} by their {how}"
    params |= {"bias": str(bias.dtype)[6:]} if bias is not None else {}
    params |= {"scale": f"{router.scale:.6g}"} if router.scale != 1.0 else {}
    return Site(
        NAME, router.output, (choice.x, *((choice.bias,) if choice.bias is not None else ())), nodes, made,
        router.topk, params, (TIES,), extra_outputs=(router.ids,), probes={choice.x: untied_logits(router)},
        stand_ins={router.topk: _in_order(router)} if router.unordered else {},
        facts={"ties": True, "trained": trained, "router": router, "launches": launches,
               "saved": launches_saved(router, nodes)},
    )  # fmt: skip


def _in_order(router: Router) -> StandIn:
    """Where the code leaves the order of a token's experts open, the op's order is one of those it allows."""
    source = router.topk.args[0]
    assert isinstance(source, Node)
    return StandIn((source,), lambda scores: torch.topk(scores, router.k, -1), ("topk in order", router.k))


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """The option, launches, and the ops' documents: 2048 experts, k up to 1024, groups of more than two experts whose
    sizes, rounded up to 32, come to 2048 together, one dtype of logits and bias."""
    if target.gating == "never" or (site.facts["trained"] and target.gating != "always"):
        why = f'{TIES}; moe_gating="always" fuses it' if target.gating == "inference" else 'moe_gating="never"'
        return Refusal(Status.SKIPPED, f"{NAME}.option", why)
    op, launches = site.facts["launches"][form.name]
    if launches >= site.facts["saved"]:
        reason = f"the form '{form.name}' launches {launches} kernels, what it replaces {site.facts['saved']}"
        return Refusal(Status.REFUSED_BY_PROFIT, f"{NAME}.launches", reason)
    router: Router = site.facts["router"]
    if target.name != "npu":
        return None
    width: torch.dtype = form.key[1]
    if width == torch.float64:
        return _refused("dtype", op, "takes no float64")
    refused = on_npu(NAME, target, (op,), width)
    if refused is not None:
        return refused
    if op == SOFT and target.names_in_graph:
        return _refused("graph", op, "has no argument renorm in torchair's GE converter")
    experts, groups = static(d.tensor(router.choice.x).shape[-1]) or 0, router.choice.groups  # type: ignore[union-attr]
    if op != GATED:
        return _refused("k", op, f"takes k up to {MAX_K}, here {router.k}") if router.k > MAX_K else None
    count, kept = (groups.count, groups.kept) if groups is not None else (1, 1)
    size = experts // count
    if experts > MAX_EXPERTS or -(-size // 32) * 32 * count > MAX_EXPERTS:
        return _refused("experts", op, f"takes {MAX_EXPERTS} experts, groups filled up to 32, here {count} of {size}")
    if size <= 2 or router.k > size * kept:
        return _refused("groups", op, f"takes groups of more than 2 and k up to {size * kept}, here {router.k}")
    return None


def _refused(code: str, op: str, reason: str) -> Refusal:
    return Refusal(Status.REFUSED_BY_TARGET, f"{NAME}.{code}", f"{op} {reason} (its documents)")


RULE = Rule(NAME, recognise, limits, first=True, order=10)
