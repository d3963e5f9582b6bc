"""What a node computes, whatever it is called: one small vocabulary for Dynamo's and aten's graphs.

A Dynamo graph spells a product `operator.mul`, `torch.mul`, `Tensor.mul`, `operator.imul` or `mul_`;
an aten graph spells it `aten.mul.Tensor`. Rules read `name(node)` and `operands(node)` and never see
the difference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub",
    "negative": "neg", "absolute": "abs", "matmul": "matmul", "__mul__": "mul", "__add__": "add",
    "__sub__": "sub", "__truediv__": "div", "__neg__": "neg", "__pow__": "pow", "__rmul__": "mul",
    "__radd__": "add", "__rsub__": "rsub", "__rtruediv__": "rdiv", "__rpow__": "rpow",
    "float_power": "pow", "clip": "clamp", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose",
    "swapdims": "transpose", "moveaxis": "movedim", "linalg_vector_norm": "norm", "vector_norm": "norm",
    "linalg_norm": "norm", "linalg_vecdot": "vecdot",
    "special_expit": "sigmoid", "expit": "sigmoid", "special_erf": "erf",
    "_unsafe_view": "view", "lift_fresh_copy": "clone", "_conj": "conj", "_reshape_alias": "reshape",
    "_fused_rms_norm": "_fused_rms_norm", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div",
    "ipow": "pow", "split_with_sizes": "split", "_upcast": "to", "_grouped_mm": "grouped_mm",
}  # fmt: skip
IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem,
    operator.iand, operator.ior, operator.ixor, operator.imod, operator.ifloordiv, operator.imatmul,
}  # fmt: skip
CASTS = frozenset(
    "to float half bfloat16 double type_as type _to_copy convert_element_type _npu_dtype_cast"
    " npu_dtype_cast _autocast_to_reduced_precision _autocast_to_full_precision".split()
)
MOVEMENT = frozenset(
    "view reshape transpose permute t mT unsqueeze squeeze expand expand_as slice getitem chunk split"
    " unsafe_split unsafe_chunk unbind tensor_split select narrow cat stack roll flip flatten unflatten ravel"
    " view_as reshape_as contiguous clone alias repeat_interleave repeat tile movedim broadcast_to hstack"
    " vstack dstack column_stack view_as_complex view_as_real real imag conj diagonal adjoint fliplr"
    " broadcast_tensors".split()
)
POINTWISE = frozenset(
    "add sub rsub mul div rdiv neg abs pow square sqrt rsqrt reciprocal exp log sigmoid tanh erf silu gelu relu"
    " clamp clamp_min clamp_max minimum maximum addcmul addcdiv cos sin".split()
)
REDUCTIONS = frozenset("mean sum norm".split())
RANDOM = frozenset(
    "dropout rand randn rand_like randn_like bernoulli multinomial normal randint randperm"
    " native_dropout alpha_dropout feature_dropout uniform exponential".split()
)


def raw_name(node: Node) -> str:
    """The target's own name: `mul_`, `imul`, `silu`, `getitem`."""
    if node.op == "call_method":
        return cast(str, node.target)
    if node.op != "call_function":
        return ""
    target = cast(Any, node.target)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target).rsplit(".", maxsplit=1)[-1]
    return cast(str, getattr(target, "__name__", str(target)))


def name(node: Node) -> str:
    """The canonical name: in-place and operator forms have the name of what they compute."""
    op = node.op
    if op not in ("call_function", "call_method"):
        return ""
    result = _names.get(node.target)
    if result is None:
        result = _names[node.target] = _canonical(node)
    if result == "cast":
        return "cast" if is_float_cast(node) else "cast:other"
    if result == "getattr":
        return {"T": "t", "mT": "mT", "real": "real", "imag": "imag"}.get(str(node.args[1]), "getattr")
    return result


_names: dict[Any, str] = {}
"""Canonical names by target: a target means the same in every graph."""


def _canonical(node: Node) -> str:
    raw = raw_name(node)
    if raw.endswith("_") and not raw.endswith("__") and len(raw) > 1 and not _is_python_operator(node):
        raw = raw[:-1]
    result = ALIASES.get(raw, raw)
    return "cast" if result in CASTS else result


def _is_python_operator(node: Node) -> bool:
    return getattr(node.target, "__module__", None) in ("_operator", "operator")


def mutates(node: Node) -> bool:
    """True where the node writes into one of its operands."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if node.target in IN_PLACE_OPERATORS:
        return True
    if _is_python_operator(node):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    raw = raw_name(node)
    if raw.endswith("_") and not raw.endswith("__"):
        return True
    return len(node.args) > 1 and node.args[-1] is True and raw in ("silu", "relu", "relu6", "hardswish", "mish")


def value(arg: Any) -> Any:
    """The example value of a node (fake tensor, SymInt, number, tuple), or the argument itself."""
    if isinstance(arg, Node):
        meta = arg.meta
        return meta["example_value"] if "example_value" in meta else meta.get("val")
    return arg


def tensor(arg: Any) -> torch.Tensor | None:
    if isinstance(arg, Node):  # as `value`: the most frequent question of all
        meta = arg.meta
        arg = meta["example_value"] if "example_value" in meta else meta.get("val")
    return arg if isinstance(arg, torch.Tensor) else None


def local(arg: Any) -> torch.Tensor | None:
    """What a rank holds: of a DTensor its shard, of other tensors all."""
    found = tensor(arg)
    return getattr(found, "_local_tensor", found)


def is_float_cast(node: Node) -> bool:
    """A change of floating dtype (or none) and of nothing else: same device, same shape."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    before, after = tensor(source), tensor(node)
    if before is None or after is None:
        return False
    return before.dtype in PLAIN_FLOATS and after.dtype in PLAIN_FLOATS and before.device == after.device


PLAIN_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def operand(node: Node, index: int, keyword: str, default: Any = None) -> Any:
    """Positional argument `index`, or the keyword of that name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(keyword, default)


def binary(node: Node) -> tuple[Any, Any]:
    """Both operands of a binary operation, in the order of the mathematics (`rsub(a, b)` is b - a)."""
    first = operand(node, 0, "input", node.kwargs.get("self"))
    second = operand(node, 1, "other", node.kwargs.get("exponent"))
    if name(node) in ("rsub", "rdiv", "rpow"):
        return second, first
    return first, second


def unary(node: Node) -> Any:
    return operand(node, 0, "input", node.kwargs.get("self"))


def tensors_in(node: Node) -> list[Node]:
    """The operands that are tensors (or tuples of them), in order, with repetition."""
    found: list[Node] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, Node):
            found.append(arg)
        elif isinstance(arg, (tuple, list)):
            for item in arg:
                visit(item)
        elif isinstance(arg, slice):
            for item in (arg.start, arg.stop, arg.step):
                visit(item)

    for arg in node.args:
        visit(arg)
    for arg in node.kwargs.values():
        visit(arg)
    return found


LIKE_ANOTHER = frozenset(("view_as", "reshape_as", "expand_as"))


def data_inputs(node: Node) -> list[Node]:
    """The operands whose values matter: `x.type_as(y)` and `x.view_as(y)` read no value of y."""
    if node.op.startswith("call") and (name(node) == "cast" or name(node) in LIKE_ANOTHER):
        return [n for n in node.args[:1] if isinstance(n, Node)]
    return node.all_input_nodes


def moves(node: Node) -> bool:
    """Movement of elements, the same whatever the values: an index by a tensor is none, nor is the choice of one
    of an operation's several results."""
    if not node.op.startswith("call") or name(node) not in MOVEMENT:
        return False
    if name(node) != "getitem":
        return True
    source = node.args[0]
    if isinstance(source, Node) and isinstance(value(source), (tuple, list)):
        return moves(source)
    return not any(tensor(n) is not None for n in tensors_in_index(node))


def tensors_in_index(node: Node) -> list[Node]:
    return [n for n in tensors_in(node)[1:] if n is not node.args[0]]


def constant(arg: Any) -> float | None:
    """A Python number in an operand's place (or a node known to be one), or None. Bools are no numbers here."""
    if isinstance(arg, Node):
        arg = value(arg)
        if isinstance(arg, torch.SymFloat) and arg.node.expr.is_number:
            return float(arg.node.expr)
        if not isinstance(arg, float):
            return None
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    return None


def symbolic_scalar(arg: Any) -> bool:
    """A node that stands for a Python number or for sizes: an `item` of a 0-d tensor, a `size`."""
    return isinstance(arg, Node) and isinstance(value(arg), (torch.SymFloat, torch.SymInt, int, float, torch.Size))


def computed_scalar(node: Node) -> bool:
    """A symbolic float made from another one, such as `-limit`."""
    return node.op == "call_function" and isinstance(value(node), torch.SymFloat)


def function_of(node: Node) -> Callable[..., Any]:
    """The callable that computes the node, methods included."""
    if node.op == "call_method":
        method = cast(str, node.target)
        return lambda self, *args, **kwargs: getattr(self, method)(*args, **kwargs)
    return cast(Callable[..., Any], node.target)
