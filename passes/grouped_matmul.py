"""Grouped matmul: row s of x times the weight of the expert that it belongs to  →  npu_grouped_matmul.

x [S, K] sorted by expert, weight [E, K, N] (contiguous, or a transposed view: no copy), ends [E] of the groups,
y [S, N] in x's dtype. torch_npu's op has no backward, and torch's has no NPU kernel (a loop over experts with a
host read each): `grouped_matmul` is both with npu_fuse's own backward, of grouped matmuls.
Semantics: torch_npu's document of npu_grouped_matmul and aclnnGroupedMatmul. Rows past the last end are left
unwritten by the NPU's kernel and by torch's alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import experts, ops
from npu_fuse.emit import Emitter, item
from npu_fuse.limits import is_old, on_npu
from npu_fuse.report import Status
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View, static

NAME = "grouped_matmul"
SPELLINGS = {"grouped_mm": False, "grouped_mm_fallback": True, "grouped_matmul": False}
"""Calls with torch's arguments, and whether rows of no group are zeros by contract. The last is the op below, which
`group_experts` writes and which says so itself."""
MAX_EXPERTS = 1024
MAX_LIST = 128
"""Weights in one list (torch_npu's document of npu_grouped_matmul)."""
MAX_INNER = 65535


# --- the op: reference kernel, backward ------------------------------------------------------------


def _forward(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, zero_rest: bool) -> torch.Tensor:
    """x [S, K], weight [E, K, N], ends [E] → [S, N]; rows of no group are zeros with `zero_rest`, else anything."""
    if x.device.type == "npu":
        y = _npu([x], [weight], ends, split_item=2, group_type=0)
        return _masked(y, ends) if zero_rest else y
    if _has_kernel(x, weight):
        y = torch._grouped_mm(x, weight, offs=ends.to(torch.int32))
        return _masked(y, ends) if zero_rest else y
    parts = [x[a:b] @ weight[e] for e, (a, b) in enumerate(bounds(ends))]
    rest = x.shape[0] - sum(p.shape[0] for p in parts)
    return torch.cat([*parts, x.new_zeros(rest, weight.shape[2])])


def by_list(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor],
            ends: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """x [S, K] by weights [N, K] and biases [N] or none; zeros in rows of no group."""
    linear = torch.nn.functional.linear
    added = [b.to(x.dtype) for b in biases]
    parts = [linear(x[a:b], weights[e], added[e] if added else None) for e, (a, b) in enumerate(bounds(ends))]
    rest = x.shape[0] - sum(p.shape[0] for p in parts)
    return torch.cat([*parts, x.new_zeros(rest, parts[0].shape[1])])


def _weight_gradient(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, K], dy [S, N], ends [E] → [E, K, N]: xᵀ · dy over the rows of each group, zeros for an empty one."""
    if x.device.type == "npu":
        return _npu([x.t()], [dy], ends, split_item=3, group_type=2)
    if _has_kernel(x, dy):
        return torch._grouped_mm(x.t(), dy, offs=ends.to(torch.int32))
    return torch.stack([x[a:b].t() @ dy[a:b] for a, b in bounds(ends)])


def _npu(x: list[torch.Tensor], weight: list[torch.Tensor], ends: torch.Tensor, **how: int) -> torch.Tensor:
    call = torch.ops.npu.npu_grouped_matmul.default
    result: torch.Tensor = call(x, weight, group_list=ends.to(torch.int64), group_list_type=0, **how)[0]
    return result


def _masked(y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    rest = torch.arange(y.shape[0], device=y.device) >= ends[-1]
    return y.masked_fill(rest.unsqueeze(1), 0)


def bounds(ends: torch.Tensor) -> list[tuple[int, int]]:
    values = [int(end) for end in ends.tolist()]
    return list(zip([0, *values[:-1]], values, strict=True))


def _has_kernel(*tensors: torch.Tensor) -> bool:
    """torch has a grouped matmul for these: 16-byte rows, bfloat16, or on a CPU outside a trace float16 and 32."""
    real = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    on_cpu = real and all(t.device.type == "cpu" and not torch.compiler.is_compiling() for t in tensors)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_cpu else (torch.bfloat16,)
    return all(t.dtype in dtypes and _aligned(t) for t in tensors)


def _aligned(t: torch.Tensor) -> bool:
    rows, columns = t.stride()[-2:]
    other = rows if columns == 1 else columns if rows == 1 else 0
    return isinstance(other, int) and other > 0 and other * t.element_size() % 16 == 0


def _fake(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, zero_rest: bool) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _fake_weight_gradient(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], dy.shape[1])


def _expand(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, zero_rest: bool) -> Any:
    """For compilers: torch's own op where it takes these tensors in a trace, else the call stays."""
    return _forward(x, weight, ends, zero_rest) if x.device.type != "npu" and _has_kernel(x, weight) else NotImplemented


def _expand_weight_gradient(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> Any:
    return _weight_gradient(x, dy, ends) if x.device.type != "npu" and _has_kernel(x, dy) else NotImplemented


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ends, ctx.zero_rest = inputs
    ctx.save_for_backward(x, weight, ends)


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    x, weight, ends = ctx.saved_tensors
    dy = dy.contiguous()
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = ops.backward_op("grouped_matmul")(dy, weight.transpose(1, 2), ends, ctx.zero_rest)
    if ctx.needs_input_grad[1]:
        gradient = ops.backward_op("grouped_matmul_weight_gradient")
        # A transposed view's gradient is made in the layout of what it is a view of.
        transposed = weight.stride(1) == 1 and weight.stride(2) != 1
        dw = gradient(dy, x, ends).transpose(1, 2) if transposed else gradient(x, dy, ends)
    return dx, dw, None, None


ops.define(
    "grouped_matmul(Tensor x, Tensor weight, Tensor ends, bool zero_rest) -> Tensor",
    _forward, keeps=(0, 1, 2), fake=_fake, expand=_expand,
)  # fmt: skip
ops.define(
    "grouped_matmul_weight_gradient(Tensor x, Tensor dy, Tensor ends) -> Tensor",
    _weight_gradient, fake=_fake_weight_gradient, expand=_expand_weight_gradient,
)  # fmt: skip
ops.differentiable("grouped_matmul", _backward, _setup)


def _ends(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Where the rows of each expert end once sorted: indices of any shape, weight [E, …] → int64 [E]."""
    experts_ = weight.shape[0]
    flat = indices.reshape(-1)
    flat = flat.float() if flat.device.type in ("cpu", "mps") else flat.int()  # as torch's kernels demand
    return torch.histc(flat, bins=experts_, min=0, max=experts_ - 1).cumsum(0, dtype=torch.int64)


def _ends_of(indices: torch.Tensor, experts: int) -> torch.Tensor:
    """The same for a number of experts."""
    return _ends(indices, torch.empty((), device=indices.device).expand(experts))


ops.define("expert_ends(Tensor indices, Tensor weight) -> Tensor", _ends)
ops.define("ends_of_experts(Tensor indices, int experts) -> Tensor", _ends_of)


def _npu_reference(
    x: list[torch.Tensor], weight: list[torch.Tensor], *, group_list: torch.Tensor | None = None,
    split_item: int = 0, group_type: int | None = None, group_list_type: int = 0, **rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """The floating-point forms with one x: group_type 0 (rows; one weight or a list) and 2 (the reduced dimension)."""
    given = [name for name, value in rest.items() if name != "bias" and value not in (None, 0)]
    bias = rest.get("bias")
    listed = len(weight) > 1 and group_type == 0
    unlike = len(x) != 1 or (not listed and (len(weight) != 1 or bool(bias)))
    if given or unlike or group_list is None or split_item not in (2, 3):
        raise NotImplementedError(f"npu_grouped_matmul with {given or 'lists'} has no reference; use split_item 2 or 3")
    ends = group_list if group_list_type == 0 else group_list.cumsum(0)
    if listed:
        return [by_list(x[0], [w.t() for w in weight], bias or [], ends)]
    if group_type == 0:
        return [_forward(x[0], weight[0], ends, False)]
    return [_weight_gradient(x[0].t(), weight[0], ends)]


def _npu_fake(x: Any, weight: Any, *, group_list: torch.Tensor, group_type: int | None = None, **rest: Any) -> Any:
    if group_type == 0:
        return [x[0].new_empty(x[0].shape[0], weight[0].shape[-1])]
    return [x[0].new_empty(group_list.shape[0], x[0].shape[0], weight[0].shape[1])]


ops.define(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None,"
    " Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None,"
    " Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None,"
    " Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0,"
    " int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None,"
    " int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None,"
    " int? per_token_scale_dtype=None) -> Tensor[]",
    _npu_reference, fake=_npu_fake,
)  # fmt: skip


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    return [_site(view, n) for n in view.named(*SPELLINGS) if not n.meta.get("npu_fuse")]


def _site(view: View, node: Node) -> Site | Miss:
    arguments, result = experts.arguments(node), d.tensor(node)
    if arguments is None or result is None:
        reason = "only rows [S, K] by weights [E, K, N] of one dtype, with ends of groups and no bias, are fused"
        return Miss(NAME, node, "grouped_matmul.arguments", reason)
    x, weight, ends = arguments
    value, other = d.tensor(x), d.tensor(weight)
    assert value is not None and other is not None
    full = experts.covers_all_rows(view, ends, value.shape[0])
    contract = bool(node.args[3]) if d.name(node) == NAME else SPELLINGS[d.name(node)]
    zero_rest = contract and not full
    trained = result.requires_grad
    copies = not _kernel_layout(other)
    form = Form("rows by ends of groups", _emit(x, weight, ends, trained, zero_rest), (trained, zero_rest))
    params = {
        "experts": str(other.shape[0]), "weights": "copied" if copies else _kernel_layout(other),
        "rest": "none" if full else "zeros" if zero_rest else "unwritten",
    }  # fmt: skip
    notes = ("the NPU's kernel copies weights of these strides in every call",) if copies else ()
    return Site(
        NAME, node, (x, weight, ends), (node,), (form,), node, params, notes,
        probes={ends: experts.ends_probe(x, covers_all=not contract or full)},
        pool=(256, 16, 8, 32), facts={"kept": 0},
    )  # fmt: skip


def _kernel_layout(weight: torch.Tensor) -> str:
    """How [E, K, N] lies in memory, where the NPU's kernel reads it as it is; "" where it is copied."""
    if weight.is_contiguous():
        return "as they are"
    return "transposed view" if weight.transpose(1, 2).is_contiguous() else ""


def _emit(x: Node, weight: Node, ends: Node, trained: bool, zero_rest: bool) -> Any:
    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        groups = env[ends]
        if e.target.name == "npu":
            groups = e.shared("grouped_matmul.ends", (groups,), lambda g: e.call(torch.Tensor.to, g, torch.int64))
        return call(e, env[x], env[weight], groups, trained, zero_rest)

    return emit


def call(e: Emitter, rows: Any, weight: Any, ends: Any, trained: bool, zero_rest: bool) -> Any:
    """The NPU's own op in inference; with a gradient, or zeros to write, ours around it."""
    if e.target.name == "npu":
        rows = e.dense(rows)
        if not trained and not zero_rest:
            made = e.fused(
                "npu_grouped_matmul", [rows], [weight], group_list=ends, split_item=2, group_type=0, group_list_type=0
            )
            return item(e, made, 0)
    return e.fused("grouped_matmul", rows, weight, ends, zero_rest)


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_grouped_matmul with one weight tensor: dtypes, 1024 experts, inner sizes; on 310P inference only and a last
    size divisible by 16 (documents of npu_grouped_matmul and aclnnGroupedMatmulV5)."""
    value = d.tensor(site.inputs[0])
    if target.name == "npu" and site.facts.get("listed", 0) > MAX_LIST:
        listed = site.facts["listed"]
        return _refused("list", f"npu_grouped_matmul takes {MAX_LIST} weights in a list at most, here are {listed}")
    weight = next((t for n in site.inputs if (t := d.tensor(n)) is not None and t.dim() == 3), None)
    if target.name != "npu" or value is None:
        return None
    if value.dtype == torch.float64:
        return _refused("dtype", "npu_grouped_matmul takes no float64")
    refused = on_npu(NAME, target, ("npu_grouped_matmul",), value.dtype)
    if refused is not None:
        return refused
    sizes = [static(s) for s in weight.shape] if weight is not None else [None, None, None]
    if sizes[0] is not None and sizes[0] > MAX_EXPERTS:
        return _refused("experts", f"npu_grouped_matmul takes {MAX_EXPERTS} experts at most, here are {sizes[0]}")
    if any(s is not None and s > MAX_INNER for s in sizes[1:]):
        return _refused("inner", f"npu_grouped_matmul takes inner sizes up to {MAX_INNER}")
    if not is_old(target):
        return None
    result = d.tensor(site.output)
    if result is not None and result.requires_grad:
        return _refused("training", f"npu_grouped_matmul splits rows only on {target.soc}, the backward splits K")
    if sizes[2] is None or sizes[2] % 16:
        return _refused("width", f"npu_grouped_matmul takes a last size divisible by 16 on {target.soc}")
    return None


def _refused(code: str, reason: str) -> Refusal:
    return Refusal(Status.REFUSED_BY_TARGET, f"grouped_matmul.{code}", f"{reason} (document of npu_grouped_matmul)")


RULE = Rule(NAME, recognise, limits, order=15)
