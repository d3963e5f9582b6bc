"""The grouped form of one expert's segment, as Python: products become grouped matmuls over rows of all experts."""

from __future__ import annotations

from npu_fuse import dialect as d
from npu_fuse import experts
from npu_fuse.expert_params import Family, Params, Part
from npu_fuse.expert_segment import Product, Segment
from npu_fuse.source import CannotWrite, Writer, function_text
from npu_fuse.tape import Step, tensors_in


def experts_text(first: Segment, second: Segment, params: Params, writer: Writer, rest: bool) -> str:
    """`def experts(self, rows, ids, ends)`: rows [S, H] sorted by expert, their experts ids [S], ends of groups [E]."""
    if [s.name for s in first.steps] != [s.name for s in second.steps]:
        raise CannotWrite("an expert takes another way for other rows")
    writer.name(first.rows, second.rows, "rows")
    for one, other in zip(first.steps, second.steps, strict=True):
        product = first.products.get(one.index)
        if product is not None:
            text = _product(product, writer, rest)
            writer.line(writer.results(one.out, other.out, one) + text)
            continue
        if _is_alias(one, first):
            _alias(one, other, writer, first, second)
            continue
        if one.plain in ("view", "reshape"):  # of the same shape
            writer.name(one.out, other.out, writer.expression(one.args[0], other.args[0]))
            continue
        _name_operands(one, other, params, writer)
        writer.step(one, other)
    writer.line(f"return {writer.expression(first.out, second.out)}")
    return function_text("experts", ("self", "rows", "ids", "ends"), writer.lines)


def _is_alias(step: Step, segment: Segment) -> bool:
    return any(id(t) in segment.aliases for t in tensors_in(step.out))


def _alias(one: Step, other: Step, writer: Writer, first: Segment, second: Segment) -> None:
    made = tensors_in(one.out), tensors_in(other.out)
    given = {id(t): t for t in one.inputs()}, {id(t): t for t in other.inputs()}
    a = next(t for t in made[0] if id(t) in first.aliases)
    b = next((t for t in made[1] if id(t) in second.aliases), None)
    if b is None:
        raise CannotWrite("an expert takes another way for other rows")
    source = given[0][first.aliases[id(a)]], given[1][second.aliases[id(b)]]
    writer.name(a, b, writer.expression(*source))


def _name_operands(one: Step, other: Step, params: Params, writer: Writer) -> None:
    """Parameters by their path; an expert's own vector as one row for each row."""
    for a, b in zip(one.inputs(), other.inputs(), strict=True):
        if writer.known(a):
            continue
        part = params.part(a)
        if part is not None and a.dim() == 1 and (params.member(part.family.paths[0]) or part.family.stacked):
            if id(a) not in params.paths or params.member(params.paths[id(a)]):
                if one.plain not in d.POINTWISE:
                    raise CannotWrite(f"{one.name} takes a vector of an expert's own")
                writer.name(a, b, f"{_vectors(part)}[ids]")
                continue
        if id(a) in params.paths and a is b:
            writer.name(a, b, attribute(params.paths[id(a)]))


def attribute(path: str) -> str:
    """`self.experts[0].weight` as getattr takes it: names of children may be numbers."""
    text = "self"
    for part in path.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


def _product(product: Product, writer: Writer, rest: bool) -> str:
    rows = writer.name_of(product.rows)
    weight, bias = product.weight, product.bias
    if weight.family.stacked and bias is None:
        writer.values["grouped_matmul"] = experts.grouped_matmul
        return f"grouped_matmul({rows}, {_stacked(weight)}, ends, {rest})"
    writer.values["grouped_linear"] = experts.grouped_linear
    biases = _list(bias) if bias is not None else "[]"
    return f"grouped_linear({rows}, {_list(weight)}, {biases}, ends, {weight.turned}, {rest})"


def _slice(taken: tuple[int, int, int] | None) -> str:
    return ":" if taken is None else f"{taken[0]}:{taken[1]}:{taken[2]}"


def _whole(family: Family) -> str:
    """The stacked parameter as [E, …]."""
    path = attribute(family.paths[0])
    return f"{path}.view({family.experts}, {', '.join(map(str, family.shape))})"


def _stacked(part: Part) -> str:
    """[E, K, N] of a stacked parameter's part."""
    text = _whole(part.family)
    if part.rows or part.columns:
        text += f"[:, {_slice(part.rows)}, {_slice(part.columns)}]"
    return f"{text}.transpose(1, 2)" if part.turned else text


def _list(part: Part) -> str:
    """E matrices or vectors as they are stored, or parts of them."""
    taken = (part.rows, part.columns) if len(part.family.shape) == 2 else (part.columns,)
    index = ", ".join(_slice(s) for s in taken)
    sliced = f"[{index}]" if part.rows or part.columns else ""
    if part.family.stacked:
        whole = f"list({_whole(part.family)}.unbind())"
        return f"[w{sliced} for w in {whole}]" if sliced else whole
    return "[" + ", ".join(attribute(p) + sliced for p in part.family.paths) + "]"


def _vectors(part: Part) -> str:
    """[E, N] of vectors that every expert has one of."""
    if not part.family.stacked:
        return f"torch.stack({_list(part)})"
    return _whole(part.family) + (f"[:, {_slice(part.columns)}]" if part.columns else "")
