# ruff: noqa: E501 - tables of small pieces of code
"""Mistakes that can be made in a program's text. Each takes a program and a way to choose, and gives another.

Most are wrong, some are harmless and some no longer run: eager decides, never this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rules.programs import Program


class Choose(Protocol):
    """Picks one of several; hypothesis draws, or a test fixes."""

    def __call__(self, options: Sequence[Any]) -> Any: ...


Mutation = Callable[[Program, Choose], Program]

WRAPPED = (
    "clamp(-9.0, 9.0)", "clamp(-5e2, 5e2)", "clamp(-6e4, 6e4)", "clamp_min(1e-4)", "clamp(max=7.0)", "nan_to_num()",
    "detach()", "half().to({0}.dtype)", "bfloat16().to({0}.dtype)", "to(torch.float8_e5m2).to({0}.dtype)",
    "to(torch.float8_e4m3fn).to({0}.dtype)", "int().to({0}.dtype)", "abs()", "neg()", "relu()", "roll(1, -1)",
    "roll(1, 0)", "flip(-1)", "flip(0)", "mul(2)", "mul(0.5)", "add(1)", "square()", "sqrt()", "contiguous()", "clone()",
    "masked_fill({0}.abs() > 60, 0)", "masked_fill({0}.isnan(), 0)", "tril()", "cumsum(-1)", "transpose(0, 1)",
    "transpose(-1, -2)", "float()", "double()", "view({0}.shape)", "expand_as({0})", "to({0}.dtype)", "squeeze()",
    "unsqueeze(0)", "sum_to_size({0}.shape)", "reciprocal()", "sign()", "fmod(100.0)", "round()", "requires_grad_()",
)  # fmt: skip
AROUND = (
    "F.dropout({0}, 0.5, True)", "torch.where({0}.abs() < 50, {0}, 0)", "torch.maximum({0}, -{0})", "torch.cat(({0}, {0}), 0)[: {0}.shape[0]]",
    "torch.minimum({0}, {0} * 2)", "{0}[..., :64]", "{0}[:, :7]", "{0}[:1]", "{0}[::2]", "torch.nn.functional.pad({0}, (1, 0))[..., :-1]",
    "{0} - {0}.mean(-1, keepdim=True)", "{0} + 0 * {0}.mean()", "torch.stack(({0}, {0})).mean(0)", "torch.lerp({0}, {0} * 3, 0.5)",
)  # fmt: skip
WRITES = (
    "{0}.mul_(2)", "{0}.add_(1)", "{0} *= 2", "{0} += 1", "{0}[..., :1] = 0", "{0}[0] = 1", "{0}.zero_()", "{0}.neg_()",
    "{0}.view(-1).mul_(2)", "{0}.detach().mul_(2)", "{0}[:1].mul_(3)", "{0}.clamp_(-8.0, 8.0)", "torch.relu_({0})",
    "{0}.copy_({0} * 2)", "{0}.data.mul_(2)", "torch.add({0}, 1, out={0})", "{0}.t_()", "{0}.fill_(1.5)",
)  # fmt: skip
NUMBERS = {
    "-1": ("-2", "0", "1"), "1e-5": ("1e-3", "0.0", "1.0", "-1e-3"), "2": ("3", "1", "4", "1.5"), "24": ("23", "12", "1"),
    "8": ("7", "4", "6"), "12": ("11", "6", "8"), "1": ("2", "0", "-1"), "7.0": ("6.0", "70.0"), "0.5": ("0.25", "1.0"),
    "1.702": ("1.7", "1.0", "-1.702"), "0.044715": ("0.0447", "0.04"), "16": ("15", "8"), "3": ("2", "4"), "0": ("1", "-1"),
    "-0.5": ("0.5", "-1.0", "-0.25"), "7": ("8", "5"),
}  # fmt: skip
WORDS = {
    "mean": ("sum", "amax", "var", "std"), "sum": ("mean", "amax"), "rsqrt": ("sqrt", "reciprocal"), "sqrt": ("rsqrt", "square"),
    "sigmoid": ("tanh", "relu"), "silu": ("gelu", "relu", "mish", "hardswish"), "gelu": ("silu", "relu"), "erf": ("tanh", "sin"),
    "tanh": ("sigmoid", "erf"), "exp": ("exp2", "expm1", "cosh"), "keepdim=True": ("keepdim=False",), "'tanh'": ("'none'",),
    "'none'": ("'tanh'",), "cos": ("sin", "p"), "sin": ("cos", "q"), "cat": ("stack",), "stack": ("cat",), "add": ("sub", "mul"),
    "sub": ("add",), "mul": ("add", "div"), "div": ("mul",), "square": ("abs", "sqrt"), "pow": ("mul", "float_power"),
    "float()": ("half()", "bfloat16()", "double()"), "chunk": ("tensor_split",), "clamp": ("clamp_min", "clamp_max"), "unbind": ("split",),
    "::2": ("1::2", ":8", ":12"), "1::2": ("::2", "8:", "12:"), "repeat_interleave": ("repeat",), "real": ("imag",), "imag": ("real",),
    " + ": (" - ", " * ", " / "), " - ": (" + ",), " * ": (" + ", " / "), " / ": (" * ", " // "), "-x2": ("x2", "-x1", "-x2.detach()"),
    "x1": ("x2",), "o1": ("o2",), "(-": ("(",), "torch.float32": ("torch.float64", "torch.float16"), "expand": ("reshape",),
}  # fmt: skip


def wrap(program: Program, choose: Choose) -> Program:
    """A value is replaced by a function of itself right after it was made."""
    at, name = choose(_assigned(program) or [(None, "")])
    if at is None:
        return program
    template = choose((*(f"{{0}}.{w}" for w in WRAPPED), *AROUND))
    return _inserted(program, at + 1, f"{name} = {template.format(name)}", f"{name} = {template}")


def wrap_input(program: Program, choose: Choose) -> Program:
    """An input is replaced by a function of itself before anything reads it."""
    name = choose(_read_inputs(program))
    template = choose((*(f"{{0}}.{w}" for w in WRAPPED), *AROUND))
    return _inserted(program, 0, f"{name} = {template.format(name)}", f"{name} = {template} first")


def write(program: Program, choose: Choose) -> Program:
    """Something known by then is written in place."""
    at = choose(range(len(program.lines) + 1))
    name = choose(_known(program, at))
    template = choose(WRITES)
    return _inserted(program, at, template.format(name), f"{template} of {name} at {at}")


def alias(program: Program, choose: Choose) -> Program:
    """A view is taken early, and written or returned late."""
    at = choose(range(len(program.lines) + 1))
    name = choose(_known(program, at))
    view = choose(
        ("{0}.view(-1)", "{0}[:1]", "{0}.detach()", "{0}[..., :4]", "{0}.transpose(0, -1)", "{0}.unsqueeze(0)", "{0}")
    )
    made = _inserted(program, at, f"seen = {view.format(name)}", f"view of {name} at {at}")
    if choose((True, False)):
        return replace(made, result=f"{made.result}, seen")
    late = choose(range(at + 1, len(made.lines) + 1))
    return _inserted(made, late, choose(("seen.mul_(2)", "seen.add_(1)", "seen[..., :1] = 3")), f"written at {late}")


def number(program: Program, choose: Choose) -> Program:
    """One literal becomes another."""
    return _substituted(program, choose, NUMBERS, r"(?<![\w.])({})(?![\w.])")


def word(program: Program, choose: Choose) -> Program:
    """One operation becomes another."""
    return _substituted(program, choose, WORDS, "({})")


def variable(program: Program, choose: Choose) -> Program:
    """One reading of a value becomes a reading of another value known by then."""
    places = []
    for at, line in enumerate((*program.lines, program.result)):
        known = _known(program, at)
        start = line.find("=") + 1 if _target(line) else 0
        for found in re.finditer(r"(?<![\w.'])([A-Za-z]\w*)(?![\w(='])", line[start:]):
            if found.group(1) in known:
                places.append((at, start + found.start(1), start + found.end(1)))
    if not places:
        return program
    at, begin, end = choose(places)
    lines = [*program.lines, program.result]
    other = choose(_known(program, at))
    lines[at] = lines[at][:begin] + other + lines[at][end:]
    return Program(f"{program.name} ⊕ {other} in line {at}", program.inputs, tuple(lines[:-1]), lines[-1])


def keep(program: Program, choose: Choose) -> Program:
    """A value in between is a result too."""
    name = choose(_known(program, len(program.lines)))
    return replace(program, name=f"{program.name} ⊕ returns {name}", result=f"{program.result}, {name}")


def repeat(program: Program, choose: Choose) -> Program:
    """A line runs twice, or two neighbours change places."""
    if not program.lines:
        return program
    at = choose(range(len(program.lines)))
    lines = list(program.lines)
    if choose((True, False)) or at == 0:
        lines.insert(at, lines[at])
    else:
        lines[at - 1], lines[at] = lines[at], lines[at - 1]
    return Program(f"{program.name} ⊕ line {at} moved", program.inputs, tuple(lines), program.result)


def region(program: Program, choose: Choose) -> Program:
    """One line runs without gradients, or under autocast."""
    if not program.lines:
        return program
    at = choose(range(len(program.lines)))
    header = choose(
        ("with torch.no_grad():", "with torch.autocast('cpu', torch.bfloat16):", "with torch.enable_grad():")
    )
    if program.lines[at].startswith(("with", " ")):
        return program
    lines = [*program.lines[:at], header, f"    {program.lines[at]}", *program.lines[at + 1 :]]
    return Program(f"{program.name} ⊕ {header} at {at}", program.inputs, tuple(lines), program.result)


def behind(program: Program, choose: Choose) -> Program:
    """Something is done with the result."""
    tail = choose(
        (
            "* 2",
            "+ {0}",
            ".float()",
            ".transpose(0, 1)",
            ".clamp(-50.0, 50.0)",
            ".mul_(2)",
            ".sum(-1)",
            ".tanh()",
            "[:1]",
            ".detach()",
        )
    )
    if "," in program.result and not program.result.endswith(")"):
        return program
    other = choose(_read_inputs(program))
    text = f"({program.result}) {tail.format(other)}" if tail[0] in "*+" else f"({program.result}){tail}"
    return replace(program, name=f"{program.name} ⊕ {tail}", result=text)


MUTATIONS: tuple[Mutation, ...] = (
    wrap, wrap, wrap, wrap_input, write, write, alias, number, number, word, word, variable, variable, keep, repeat,
    region, behind,
)  # fmt: skip


def _target(line: str) -> str:
    found = re.match(r"\s*([A-Za-z]\w*)\s*=[^=]", line)
    return found.group(1) if found else ""


def _targets(line: str) -> list[str]:
    found = re.match(r"\s*((?:[A-Za-z]\w*\s*,\s*)*[A-Za-z]\w*)\s*=[^=]", line)
    return [name.strip() for name in found.group(1).split(",")] if found else []


def _assigned(program: Program) -> list[tuple[int, str]]:
    return [
        (at, name)
        for at, line in enumerate(program.lines)
        if not line.startswith((" ", "with", "f = "))
        for name in _targets(line)
    ]


def _read_inputs(program: Program) -> list[str]:
    text = "\n".join((*program.lines, program.result))
    read = [name for name in program.inputs if re.search(rf"(?<![\w.]){name}(?!\w)", text)]
    return read or list(program.inputs[:1])


def _known(program: Program, at: int) -> list[str]:
    names = [name for line in program.lines[:at] for name in _targets(line) if not line.startswith("f = ")]
    return list(dict.fromkeys((*_read_inputs(program), *names)))


def _inserted(program: Program, at: int, line: str, what: str) -> Program:
    lines = list(program.lines)
    while 0 < at < len(lines) and lines[at].startswith(" "):
        at += 1
    lines.insert(at, line)
    return Program(f"{program.name} ⊕ {what}", program.inputs, tuple(lines), program.result)


def _substituted(program: Program, choose: Choose, table: dict[str, tuple[str, ...]], pattern: str) -> Program:
    lines = [*program.lines, program.result]
    places = []
    for at, line in enumerate(lines):
        for old in table:
            for found in re.finditer(pattern.format(re.escape(old)), line):
                places.append((at, found.start(1), found.end(1), old))
    if not places:
        return program
    at, begin, end, old = choose(places)
    new = choose(table[old])
    lines[at] = lines[at][:begin] + new + lines[at][end:]
    return Program(
        f"{program.name} ⊕ {old.strip()} → {new.strip()} in line {at}", program.inputs, tuple(lines[:-1]), lines[-1]
    )
