"""`explain`: what npu_fuse does to a model, and why, without compiling it for good.

Captures the model with Dynamo as `torch.compile` would, lets the engine recognise, prove and lower in
every graph, and hands nothing off: the graphs run as they were captured. Nothing is left behind in the
model, in its inputs or in Dynamo.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from traceback import FrameSummary
from typing import Any

import torch

from npu_fuse import render
from npu_fuse.errors import CaptureError
from npu_fuse.options import Options, resolve_target
from npu_fuse.report import GraphReport
from npu_fuse.untouched import dynamo_untouched, model_untouched

_LIBRARY_FOLDERS = tuple(
    os.path.join(folder, "") for folder in (os.path.dirname(torch.__file__), sysconfig.get_path("stdlib"))
)
_PACKAGES = os.path.join(sysconfig.get_path("purelib"), "")
_LOGGED_FUNCTION = re.compile(r"function: '([^']+)' \((.+?):(\d+)\)")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")


@dataclass(frozen=True)
class Break:
    """A place where Dynamo ended a graph, or gave up: then `eager_function` is what runs in eager as a whole.

    `count` is how often it stopped there while compiling, not how often the line runs.
    """

    reason: str
    hints: tuple[str, ...] = ()
    file: str | None = None
    line: int | None = None
    function: str | None = None
    source: str | None = None
    eager_function: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Failure:
    """An error inside Dynamo. `fatal`: torch.compile raises it; otherwise the function runs in eager."""

    error: str
    reason: str
    file: str | None = None
    line: int | None = None
    function: str | None = None
    source: str | None = None
    fatal: bool = True


@dataclass(frozen=True)
class ExplainReport:
    """All graphs that Dynamo captured, and where and why it stopped. `str()` gives a table."""

    subject: str
    training: bool
    graphs: tuple[GraphReport, ...] = ()
    breaks: tuple[Break, ...] = ()
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        return render.text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as docs/report_format.md describes it."""
        return render.to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return render.to_json(self, indent)


def explain(
    model: Callable[..., Any],
    *args: Any,
    train: bool = False,
    options: Mapping[str, Any] | Options | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> ExplainReport:
    """Report every site of `model(*args, **kwargs)` that npu_fuse fuses or could have fused.

    `model` is an nn.Module or any callable; it is called once with the inputs given. With `train`, gradients
    are recorded and a module that is in eval mode is put in training mode for the call; otherwise the
    reverse. `options` and `dynamic` are what you would give to `torch.compile`; `strict` is ignored here.
    A model whose forward takes an argument named `train`, `options` or `dynamic` goes in a lambda.

    Raises `OptionError` and `TargetError` for wrong options, `CaptureError` if the model itself cannot run
    with these inputs. What Dynamo cannot do is no error but part of the report.
    """
    made = replace(Options.make(options), strict=False)
    resolve_target(made)
    called = _uncompiled(model)
    graphs: list[GraphReport] = []
    stops = _Stops()

    def capture_only(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from npu_fuse.backend import plan

        unchanged = _copy_graph(gm)  # a target that is not here can be planned for, and not run
        graphs.append(plan(gm, example_inputs, made, training=train and torch.is_grad_enabled()))
        return unchanged.forward

    with model_untouched(called, (args, kwargs)), dynamo_untouched(capture_only), _mode(called, train):
        compiled = torch.compile(_wrapper(called), backend=capture_only, dynamic=dynamic, **_isolated())
        with stops.collecting():
            try:
                compiled(*args, **kwargs)
            except Exception as error:
                if not _is_dynamo_error(error):
                    raise _cannot_run(error) from error
                stops.fatal(error)
        if stops.has_fatal:
            _check_runs(called, args, kwargs)
    return ExplainReport(_name(called), train, tuple(graphs), stops.breaks(), stops.failures())


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model inside what torch.compile returned, or the model itself."""
    if getattr(model, "_torchdynamo_disable", False):
        return model
    inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", model)
    return inner if callable(inner) else model


def _wrapper(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the model and whose code no one else has: Dynamo keeps what it compiles, and
    counts how often, on code objects."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace()
    return types.FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def _copy_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of the graph and its subgraphs that shares every tensor with the original."""
    tensors = [*gm.parameters(), *gm.buffers()]
    tensors += [value for m in gm.modules() for value in vars(m).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(gm, {id(tensor): tensor for tensor in tensors})


def _isolated() -> dict[str, Any]:
    """Newer torch keeps the compiled code of one `torch.compile` apart from all others if asked to."""
    name = "isolate_recompiles"
    return {name: True} if name in inspect.signature(torch.compile).parameters else {}


@contextmanager
def _mode(model: Callable[..., Any], train: bool) -> Iterator[None]:
    """Grad mode and training mode; `model_untouched` puts the modules back."""
    if isinstance(model, torch.nn.Module):
        if model.training != train:
            model.train(train)
        for module in model.modules():
            if module.__dict__.get("_compiled_call_impl") is not None:  # after model.compile()
                module.__dict__["_compiled_call_impl"] = None
    with torch.set_grad_enabled(train):
        yield


def _name(model: Callable[..., Any]) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__qualname__", type(model).__name__))


# ------------------------------------------------------------------------------- where and why Dynamo stopped


class _Stops:
    """Collects graph breaks, frames left to eager and errors of Dynamo while a model is compiled."""

    def __init__(self) -> None:
        self._breaks: list[Break] = []
        self._failures: list[Failure] = []
        self.has_fatal = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Dynamo keeps the reasons of graph breaks in a list, and tells of frames that it gives up on in its
        log alone: read both, and show the user no more of the log than before."""
        from torch._dynamo import utils

        log = logging.getLogger("torch._dynamo.convert_frame")
        level, shown_from = log.level, log.getEffectiveLevel()
        start = len(utils.graph_break_reasons)

        def read(record: logging.LogRecord) -> bool:
            self._logged(record)
            return record.levelno >= shown_from

        log.addFilter(read)
        log.setLevel(min(logging.INFO, shown_from))
        try:
            yield
        finally:
            log.setLevel(level)
            log.removeFilter(read)
            for item in utils.graph_break_reasons[start:]:
                self._breaks.append(_break(str(item.reason), item.user_stack))

    def _logged(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and record.levelno < logging.WARNING:
            stopped = _break(_message(error), _stack(error), gave_up=True)
            if stopped.file or not self._failures:  # else a warning has told it already, with the place
                self._breaks.append(stopped)
        elif error is not None:
            self._failures.append(_failure(error, fatal=False))
        elif record.levelno >= logging.WARNING:
            text = " ".join(record.getMessage().split())
            where = _LOGGED_FUNCTION.search(text)
            function, file, line = (where[1], where[2], int(where[3])) if where else (None, None, None)
            self._failures.append(Failure("warning", text, file, line, function, fatal=False))

    def fatal(self, error: BaseException) -> None:
        self.has_fatal = True
        self._failures.append(_failure(error, fatal=True))

    def breaks(self) -> tuple[Break, ...]:
        """One for each line: Dynamo meets a break again in every function that it breaks up on the way."""
        first: dict[Any, Break] = {}
        for item in self._breaks:
            key = (item.file, item.line) if item.file else item.reason
            old = first.get(key)
            if old is None:
                first[key] = item
            else:
                eager = old.eager_function or item.eager_function
                first[key] = replace(old, count=old.count + 1, eager_function=eager)
        return tuple(first.values())

    def failures(self) -> tuple[Failure, ...]:
        return tuple(dict.fromkeys(self._failures))


def _break(message: str, stack: Sequence[FrameSummary], gave_up: bool = False) -> Break:
    reason, hints = _parse(message)
    # The outermost frame is the function that Dynamo was compiling; our own wrapper has nothing to lose.
    eager = _function(stack[0]) if gave_up and stack and stack[0].filename != __file__ else None
    return Break(reason, hints, *_place(stack), eager_function=eager)


def _failure(error: BaseException, fatal: bool) -> Failure:
    reason, _ = _parse(_message(error))
    return Failure(type(error).__name__, reason, *_place(_stack(error)), fatal=fatal)


def _message(error: BaseException) -> str:
    return str(getattr(error, "msg", None) or error)


def _stack(error: BaseException) -> Sequence[FrameSummary]:
    return getattr(error, "real_stack", None) or ()


def _parse(message: str) -> tuple[str, tuple[str, ...]]:
    """Dynamo's message (kind, explanation, hints, developer context, link) as one sentence and its hints."""
    head = re.split(r"\n\s*Hint:|\n\s*Developer debug context:|\n\s*from user code:|\n\n\*\*\*", message)[0]
    kind, _, explanation = head.partition("Explanation:")
    kind = " ".join(kind.split())
    explanation = _ADDRESS.sub("", " ".join(explanation.strip().split("\n\n")[0].split()))
    hints = re.findall(r"^\s*Hint:\s*(.*?)(?=^\s*Hint:|^\s*$|\Z)", message, re.MULTILINE | re.DOTALL)
    return (f"{kind}: {explanation}" if explanation else kind), tuple(" ".join(h.split()) for h in hints)


def _place(stack: Sequence[FrameSummary]) -> tuple[str | None, int | None, str | None, str | None]:
    """File, line, function and source text of the innermost frame outside of torch, npu_fuse and Python."""
    frames = [frame for frame in stack if frame.filename != __file__]
    own = [frame for frame in frames if not _in_library(frame.filename)]
    for frame in reversed(own or frames):
        return frame.filename, frame.lineno, _function(frame), frame.line
    return None, None, None, None


def _function(frame: FrameSummary) -> str:
    """The user's name of a function, also where Dynamo runs the rest of it under a name of its own."""
    resumed = _RESUMED.fullmatch(frame.name)
    return resumed[1] if resumed else frame.name


def _in_library(file: str) -> bool:
    """Whether a file belongs to torch or to Python; other packages may hold the model."""
    return file.startswith(_LIBRARY_FOLDERS[0]) or (
        file.startswith(_LIBRARY_FOLDERS[1]) and not file.startswith(_PACKAGES)
    )


def _is_dynamo_error(error: BaseException) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException) or hasattr(error, "_torch_dynamo_tracer_output")


def _check_runs(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `CaptureError` if the model fails in eager too: then the inputs are wrong, not Dynamo."""
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise _cannot_run(error) from error


def _cannot_run(error: BaseException) -> CaptureError:
    return CaptureError(
        f"the model cannot run with these inputs: {type(error).__name__}: {render.first_line(str(error))}",
        remedy="call the model with the same inputs and without torch.compile, and make that work first",
    )
