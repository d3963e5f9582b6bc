"""RMSNorm: y = x / sqrt(mean(x², last dims) + epsilon) · gamma  →  npu_rms_norm.

x [..., D], gamma [D] (or the shape of the last k dimensions), y like x, rstd [..., 1] in float32.
One rounding, after gamma; all statistics in float32. Semantics: torch_npu's document of npu_rms_norm
and the CANN operators aclnnRmsNorm and aclnnRmsNormGrad.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra, ops
from npu_fuse import dialect as d
from npu_fuse.emit import Emitter, item
from npu_fuse.epsilon import default_epsilon
from npu_fuse.limits import is_old, on_npu
from npu_fuse.report import Status
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View, static, widens

NAME = "rms_norm"
COPIES = frozenset(("cast", "clone", "contiguous"))
"""The same values again, up to a rounding mark."""
MAX_RANK = 8
OLD_BYTES = 32


# --- the op: reference kernel, backward ------------------------------------------------------------


def _forward(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(x.dtype)
    wide = x.to(dtype)
    rstd = _rstd(wide, gamma, epsilon)
    return (wide * rstd * gamma.to(dtype)).to(x.dtype), rstd


def _rstd(wide: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.rsqrt(wide.pow(2).mean(list(range(-gamma.dim(), 0)), keepdim=True) + epsilon)


def _backward_op(
    dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(x.dtype)
    dims = list(range(-gamma.dim(), 0))
    normed = x.to(dtype) * rstd
    wide = dy.to(dtype)
    scaled = wide * gamma.to(dtype)
    dx = (scaled - normed * (scaled * normed).mean(dims, keepdim=True)) * rstd
    leading = list(range(x.dim() - gamma.dim()))
    dgamma = wide * normed
    return dx.to(x.dtype), dgamma.sum(leading) if leading else dgamma


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, gamma, ctx.epsilon = inputs
    ctx.save_for_backward(x, gamma, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _: Any) -> Any:
    if dy is None:
        return None, None, None
    x, gamma, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a second derivative rstd depends on x
        rstd = _rstd(x.to(rstd.dtype), gamma, ctx.epsilon)
    dx, dgamma = ops.backward_op("npu_rms_norm_backward")(dy, x, gamma, rstd)
    return dx, dgamma.to(gamma.dtype), None


ops.define("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)", _forward, keeps=(0, 1))
ops.define("npu_rms_norm_backward(Tensor dy, Tensor self, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)", _backward_op)
ops.differentiable("npu_rms_norm", _backward, _setup)


# --- the rule --------------------------------------------------------------------------------------


@dataclass
class _Walk:
    """A product on its way from the root to x·r·gamma: x^x · S^e · coefficient · gammas."""

    node: Node
    x: int = 0
    e: float = 0.0
    coefficient: float = 1.0
    gammas: tuple[Node, ...] = ()
    seen: tuple[Node, ...] = field(default_factory=tuple)

    @property
    def is_norm(self) -> bool:
        return self.x == 1 and self.e == -0.5


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for node in view.named("rms_norm", "rsqrt", "sqrt", "pow", "norm", "normalize"):
        if node in view.claimed:
            continue
        name = d.name(node)
        result: Site | Miss | None
        if name == "rms_norm":
            result = _direct(view, node)
        elif name == "normalize":
            result = _normalized(node)
        else:
            result = _from_root(view, node)
        if result is not None:
            found.append(result)
    inner = {n for result in found if isinstance(result, Site) for n in result.nodes}
    return [result for result in found if isinstance(result, Site) or result.anchor not in inner]


def _direct(view: View, node: Node) -> Site | Miss:
    """`F.rms_norm` and `nn.RMSNorm` reach the graph as one call."""
    x, shape = d.operand(node, 0, "input"), d.operand(node, 1, "normalized_shape")
    gamma, epsilon = d.operand(node, 2, "weight"), d.operand(node, 3, "eps")
    value = d.tensor(x)
    if value is None or not value.is_floating_point():
        return Miss(NAME, node, "rms_norm.dtype", "the input is no floating-point tensor")
    if epsilon is None:
        epsilon = default_epsilon(value.dtype)
    inputs = tuple(n for n in (x, gamma, epsilon) if isinstance(n, Node))
    return _site(view, node, node, x, len(shape), epsilon, gamma, 1.0, inputs, algebra.Between((node,)))


def _normalized(node: Node) -> Miss | None:
    """x / max(‖x‖, ε), scaled: an RMSNorm but for rows whose norm is about ε."""
    value, order = d.tensor(d.unary(node)), d.constant(d.operand(node, 1, "p", 2.0))
    if value is None or order != 2.0 or d.operand(node, 2, "dim", 1) not in (-1, value.dim() - 1):
        return None
    behind = [node, *(u for u in node.users if u.op.startswith("call") and d.name(u) == "cast")]
    for user in [u for n in behind for u in n.users if u.op.startswith("call")]:
        factors = [n for n in d.data_inputs(user) if n not in behind]
        by_gamma = len(factors) == 1 and algebra.per_feature(factors[0], value, 1)
        if algebra.constant_factor(user) or (d.name(user) == "mul" and by_gamma):
            reason = "normalize divides by max(‖x‖, epsilon), the op adds epsilon under the root"
            return Miss(NAME, node, "rms_norm.product", reason)
    return None


def _from_root(view: View, root: Node) -> Site | Miss | None:
    try:
        parsed = _statistic(view, root)
    except algebra.NotLast as where:
        return Miss(NAME, root, "rms_norm.dims", f"{where}, the op needs the last dimensions")
    if parsed is None:
        return None
    exponent, mean_square, epsilon, explained = parsed
    if isinstance(epsilon, float) and epsilon < 0:
        return Miss(NAME, root, "rms_norm.epsilon", f"epsilon is {epsilon}, the op needs it non-negative")
    x = view.exact(mean_square.x, root)
    walk, stopped = _forward_walk(view, root, exponent, x, mean_square.dims)
    if walk is None:
        return Miss(NAME, root, "rms_norm.product", stopped)
    coefficient = walk.coefficient * mean_square.coefficient**-0.5
    if mean_square.coefficient != 1.0 and isinstance(epsilon, float):
        epsilon = epsilon / mean_square.coefficient
    elif mean_square.coefficient != 1.0:
        return Miss(NAME, root, "rms_norm.epsilon", "epsilon is symbolic and the statistic is a sum, no mean")
    gamma = walk.gammas[0] if walk.gammas else None
    nodes = {*explained, *walk.seen, root}
    inputs = [n for n in (x, gamma, epsilon) if isinstance(n, Node)]
    region = algebra.between(view, [walk.node], inputs, lambda n: n in nodes or d.name(n) in COPIES)
    if region.stopped is not None:
        name = d.name(region.stopped) or region.stopped.op
        return Miss(NAME, root, "rms_norm.between", f"{name} stands between x and the result")
    return _site(view, root, walk.node, x, mean_square.dims, epsilon, gamma, coefficient, tuple(inputs), region)


def _statistic(view: View, root: Node) -> tuple[float, algebra.MeanSquare, float | Node, tuple[Node, ...]] | None:
    """The exponent, c · mean(x²), epsilon, and the nodes between x and the root."""
    if d.name(root) == "norm":
        found = algebra.norm_of(view, root)
        return None if found is None else (0.5, found, 0.0, found.nodes)
    rooted = algebra.root_of(root)
    if rooted is None:
        return None
    total = algebra.sum_of(view, rooted[1])
    if len(total.terms) != 1 or (total.symbol is not None and total.constant != 0.0):
        return None
    scale, term = total.terms[0]
    mean_square = algebra.mean_square_of(view, term) if isinstance(term, Node) else None
    if mean_square is None or scale <= 0:
        return None
    scaled = algebra.MeanSquare(mean_square.x, mean_square.dims, mean_square.coefficient * scale, mean_square.nodes)
    if abs(scaled.coefficient - 1.0) < 1e-12:
        scaled = algebra.MeanSquare(scaled.x, scaled.dims, 1.0, scaled.nodes)
    epsilon: float | Node = total.symbol if total.symbol is not None else total.constant
    return rooted[0], scaled, epsilon, (*mean_square.nodes, *total.nodes)


def _forward_walk(view: View, root: Node, exponent: float, x: Node, dims: int) -> tuple[_Walk | None, str]:
    """Follow the root's users until x · r · gamma stands; the furthest product that is one wins."""
    best: _Walk | None = None
    stopped = "the root is never multiplied with x"
    queue = [_Walk(root, 0, exponent, seen=(root,))]
    visited = {root}
    while queue:
        walk = queue.pop(0)
        if walk.is_norm and not _trails(walk):
            best = walk
        users = list(walk.node.users)
        if walk.is_norm and len([u for u in users if u not in visited]) > 1:
            # Used by several: the product ends here, its users see the same value as before.
            break
        for user in users:
            if user in visited or not user.op.startswith("call"):
                continue
            step = _step(view, walk, user, x, dims)
            if isinstance(step, str):
                if not walk.is_norm:
                    stopped = step
                continue
            visited.add(user)
            queue.append(step)
    return best, stopped


def _trails(walk: _Walk) -> bool:
    """The last step only widens or copies: the fused op's user can do that itself."""
    name = d.name(walk.node)
    return name in COPIES and (name != "cast" or widens(walk.node))


def _step(view: View, walk: _Walk, user: Node, x: Node, dims: int) -> _Walk | str:
    name, node = d.name(user), walk.node
    seen = (*walk.seen, user)
    if not view.same_version(node, user):
        return "the product is changed in place before it is used"
    if name in COPIES:
        return _Walk(user, walk.x, walk.e, walk.coefficient, walk.gammas, seen)
    if walk.x == 0 and not walk.gammas and name in ("unsqueeze", "getitem", "expand", "view", "reshape", "expand_as"):
        return _Walk(user, walk.x, walk.e, walk.coefficient, walk.gammas, seen)
    factor = algebra.constant_factor(user)
    if factor is not None and factor[1] is node:
        if walk.gammas or walk.is_norm:
            return "a constant factor behind the norm"
        return _Walk(user, walk.x, walk.e, walk.coefficient * factor[0], walk.gammas, seen)
    if name == "reciprocal" and not walk.gammas and walk.x == 0:
        return _Walk(user, 0, -walk.e, 1.0 / walk.coefficient, (), seen)
    if name == "pow" and d.constant(d.binary(user)[1]) == -1.0 and walk.x == 0 and not walk.gammas:
        return _Walk(user, 0, -walk.e, 1.0 / walk.coefficient, (), seen)
    if name == "div":
        first, second = d.binary(user)
        if second is node and walk.x == 0 and not walk.gammas and user.kwargs.get("rounding_mode") is None:
            walk = _Walk(node, 0, -walk.e, 1.0 / walk.coefficient, (), walk.seen)
            number = d.constant(first)
            if number is not None:
                return _Walk(user, 0, walk.e, walk.coefficient * number, (), seen)
            return _times(view, walk, user, first, x, dims)
        return "divided by something else"
    if name == "mul":
        first, second = d.binary(user)
        return _times(view, walk, user, second if first is node else first, x, dims)
    if name in ("clamp", "clamp_min", "clamp_max", "maximum"):
        return f"{name} is applied to the root; the op adds epsilon under it"
    if name == "add" and walk.x == 0:
        return "epsilon is added outside the root; the op adds it under the root"
    return f"{name} follows the root"


def _times(view: View, walk: _Walk, user: Node, other: Any, x: Node, dims: int) -> _Walk | str:
    value = d.tensor(x)
    if not isinstance(other, Node) or value is None or not view.same_version(other, user):
        return "multiplied with something else"
    product = _product_with_x(view, other, x, dims)
    if product is not None and walk.x == 0:
        coefficient, gammas, nodes = product
        if len(walk.gammas) + len(gammas) <= 1:
            return _Walk(
                user, 1, walk.e, walk.coefficient * coefficient, walk.gammas + gammas, (*walk.seen, *nodes, user)
            )
    if algebra.per_feature(other, value, dims) and not walk.gammas:
        return _Walk(user, walk.x, walk.e, walk.coefficient, (view.exact(other, user),), (*walk.seen, user))
    return "multiplied with another value than the one squared"


def _product_with_x(
    view: View, node: Node, x: Node, dims: int
) -> tuple[float, tuple[Node, ...], tuple[Node, ...]] | None:
    """`x`, `c·x`, `gamma·x` behind any casts, as (c, gammas, nodes)."""
    if view.vn(node) == view.vn(x):
        return 1.0, (), ()
    value = d.tensor(x)
    if not node.op.startswith("call") or value is None:
        return None
    if d.name(node) in COPIES and isinstance(node.args[0], Node) and view.same_version(node.args[0], node):
        inner = _product_with_x(view, node.args[0], x, dims)
        return None if inner is None else (inner[0], inner[1], (*inner[2], node))
    factor = algebra.constant_factor(node)
    if factor is not None:
        inner = _product_with_x(view, factor[1], x, dims)
        return None if inner is None else (inner[0] * factor[0], inner[1], (*inner[2], node))
    if d.name(node) == "mul":
        first, second = d.binary(node)
        for left, right in ((first, second), (second, first)):
            if isinstance(left, Node) and isinstance(right, Node) and algebra.per_feature(right, value, dims):
                if view.vn(left) == view.vn(x):
                    return 1.0, (view.exact(right, node),), (node,)
    return None


def _site(
    view: View, anchor: Node, output: Node, x: Any, dims: int, epsilon: Any, gamma: Any, coefficient: float,
    inputs: tuple[Node, ...], region: algebra.Between,
) -> Site | Miss:  # fmt: skip
    value, result = d.tensor(x), d.tensor(output)
    if value is None or result is None or not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return Miss(NAME, anchor, "rms_norm.dtype", "the input is no 16-, 32- or 64-bit floating-point tensor")
    widths = [static(s) for s in tuple(value.shape)[value.dim() - dims :]]
    shape = tuple(s for s in widths if s is not None)
    if len(shape) != dims:
        return Miss(NAME, anchor, "rms_norm.width", "the normalised width is symbolic")
    if result.dim() != value.dim():
        return Miss(NAME, anchor, "rms_norm.shape", "the result has another rank than x")
    forms = tuple(_forms(x, gamma, epsilon, coefficient, shape, value.dtype, result.dtype))
    params = {"epsilon": str(epsilon), "gamma": "none" if gamma is None else str(d.tensor(gamma).dtype)[6:]}  # type: ignore[union-attr]
    if dims > 1:
        params["dims"] = str(dims)
    if coefficient != 1.0:
        params["scale"] = f"{coefficient:.6g}"
    return Site(NAME, output, inputs, region.nodes, forms, anchor, params, twins=region.twins,
                facts={"kept": dims, "x": x, "gamma": gamma, "epsilon": epsilon})  # fmt: skip


def _forms(
    x: Node, gamma: Node | None, epsilon: Any, coefficient: float, shape: tuple[int, ...], dtype: torch.dtype,
    result: torch.dtype,
) -> list[Form]:  # fmt: skip
    """As the kernel takes it first; then with everything widened to float32 before."""
    made = []
    weight = d.tensor(gamma)
    for width in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
        if width.itemsize < result.itemsize:
            continue  # the original keeps digits that this form has rounded away
        name = "as it is" if width == dtype else f"x in {str(width)[6:]}"
        key = (width, coefficient, shape, None if isinstance(epsilon, Node) else epsilon, weight is None)

        def emit(e: Emitter, env: Mapping[Node, Any], width: torch.dtype = width) -> Any:
            value = e.dense(e.cast(env[x], width))
            scale = _gamma(e, env, gamma, coefficient, shape, value, width)
            taken = env[epsilon] if isinstance(epsilon, Node) else epsilon
            y = item(e, e.fused("npu_rms_norm", value, scale, taken), 0)
            return e.cast(y, result)

        made.append(Form(name, emit, key))
    return made


def _gamma_dtype(gamma: torch.Tensor | None, coefficient: float, width: torch.dtype) -> torch.dtype:
    """The dtype in which gamma, with the constant factor in it, is given to the op beside x in `width`."""
    wide = torch.promote_types(width, torch.float32)
    if gamma is None:
        # A factor that x's dtype rounds would round every result: keep it in float32.
        return width if float(torch.tensor(coefficient, dtype=width)) == coefficient else wide
    if coefficient != 1.0:
        return wide
    if gamma.dtype not in (width, torch.float32):
        return torch.promote_types(width, gamma.dtype)
    return width if width == torch.float64 else gamma.dtype


def _gamma(
    e: Emitter, env: Mapping[Node, Any], gamma: Node | None, coefficient: float, shape: tuple[int, ...], like: Any,
    width: torch.dtype,
) -> Any:  # fmt: skip
    """Gamma in a dtype that the op takes beside x, with the constant factor in it."""
    found = d.tensor(gamma)
    dtype = _gamma_dtype(found, coefficient, width)
    if gamma is None:
        return e.filled(shape, coefficient, like, dtype)
    value = env[gamma]
    if found is not None and found.dim() != len(shape):
        value = e.call(torch.reshape, value, shape)
    value = e.cast(value, dtype) if found is None or found.dtype != dtype else value
    return e.cheap(e.call(torch.mul, value, coefficient) if coefficient != 1.0 else value)


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_rms_norm: float16, bfloat16, float32; rank 1 to 8, from 2 on in training; on 310P and 910A gamma in x's
    dtype and last dimensions of 32 bytes or more (documents of npu_rms_norm and aclnnRmsNorm)."""
    if target.name != "npu":
        return None
    x, result = d.tensor(site.facts["x"]), d.tensor(site.output)
    if x is None or result is None:
        return None
    if x.dtype == torch.float64:
        return _refused("dtype", "npu_rms_norm takes no float64")
    if x.dim() > MAX_RANK or (x.dim() < 2 and result.requires_grad):
        return _refused("rank", f"npu_rms_norm takes rank 2 to 8, x has {x.dim()}")
    refused = on_npu(NAME, target, ("npu_rms_norm",), x.dtype, form.key[0])
    if refused is not None or not is_old(target):
        return refused
    width: torch.dtype = form.key[0]
    gamma = _gamma_dtype(d.tensor(site.facts["gamma"]), form.key[1], width)
    if gamma != width:
        reason = f"npu_rms_norm takes gamma in x's dtype only on {target.soc}"
        return _refused("gamma", f"{reason}, here {str(width)[6:]} and {str(gamma)[6:]}")
    if static(x.shape[-1]) is None or x.shape[-1] * width.itemsize < OLD_BYTES:
        return _refused("tail", f"npu_rms_norm takes last dimensions from {OLD_BYTES} bytes on {target.soc}")
    return None


def _refused(code: str, reason: str) -> Refusal:
    return Refusal(Status.REFUSED_BY_TARGET, f"rms_norm.{code}", f"{reason} (document of npu_rms_norm)")


RULE = Rule(NAME, recognise, limits, order=10)
