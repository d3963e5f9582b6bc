"""Run a function on many items, each in a child process of its own with a time limit.

A model that crashes, hangs or leaks then costs one result and nothing else. Children are forked, so that what
the parent has imported (torch, transformers) is not imported again for every model.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

Result = dict[str, Any]
_POLL_SECONDS = 0.05


def isolated(
    fn: Callable[[str], Result], items: Sequence[str], timeout: float = 120.0, processes: int = 2
) -> Iterator[tuple[str, Result]]:
    """Yield (item, fn(item)) as children finish; a failure is {"error": ..., "where": ...} not raised."""
    todo = list(items)
    live: dict[str, tuple[BaseProcess, Connection, float]] = {}
    try:
        while todo or live:
            while todo and len(live) < processes:
                item = todo.pop(0)
                live[item] = _start(fn, item)
            for item, (process, pipe, started) in list(live.items()):
                result = _poll(process, pipe, time.time() - started, timeout)
                if result is not None:
                    del live[item]
                    yield item, {**result, "seconds": round(time.time() - started, 1)}
            time.sleep(_POLL_SECONDS)
    finally:
        for process, _, _ in live.values():
            process.kill()


def _start(fn: Callable[[str], Result], item: str) -> tuple[BaseProcess, Connection, float]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(fn, item, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours, time.time()


def _child(fn: Callable[[str], Result], item: str, pipe: Connection) -> None:
    try:
        result = fn(item)
    except BaseException as error:  # reported to the parent, which goes on with the next item
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        result = {
            "error": f"{type(error).__name__}: {str(error)[:600]}",
            "where": [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in frames],
        }
    pipe.send(result)
    pipe.close()


def _poll(process: BaseProcess, pipe: Connection, seconds: float, timeout: float) -> Result | None:
    result: Result | None = None
    if pipe.poll():
        try:
            result = pipe.recv()
        except EOFError:
            process.join()
            result = {"error": f"child died with exit code {process.exitcode}"}
    elif seconds > timeout:
        process.kill()
        result = {"error": f"no result within {timeout:.0f} s"}
    if result is not None:
        process.join(5)
        if process.is_alive():
            process.kill()
        pipe.close()
    return result
