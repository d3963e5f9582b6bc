"""Where and why Dynamo stopped: graph breaks, functions that it left to eager, errors of its own."""

from __future__ import annotations

import logging
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from traceback import FrameSummary
from typing import Any

_OWN_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "explain.py")  # calls the model
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


class Stops:
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
    eager = _function(stack[0]) if gave_up and stack and stack[0].filename != _OWN_FILE else None
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
    frames = [frame for frame in stack if frame.filename != _OWN_FILE]
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
    import torch

    torch_folder = os.path.join(os.path.dirname(torch.__file__), "")
    python, packages = (os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib"))
    return file.startswith(torch_folder) or (file.startswith(python) and not file.startswith(packages))


def is_dynamo_error(error: BaseException) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException) or hasattr(error, "_torch_dynamo_tracer_output")
