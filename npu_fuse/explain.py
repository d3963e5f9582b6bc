"""`explain`: what npu_fuse does to a model, and why, without compiling it for good.

Captures the model with Dynamo as `torch.compile` would, lets the engine recognise, prove and lower in
every graph, and hands nothing off: the graphs run as they were captured. Nothing is left behind in the
model, in its inputs or in Dynamo.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

# Nothing here imports torch before it is needed: `import npu_fuse` must work where torch cannot be loaded.
from npu_fuse.errors import CaptureError
from npu_fuse.options import Options
from npu_fuse.report import GraphReport
from npu_fuse.stops import Break, Failure, Stops, is_dynamo_error

if TYPE_CHECKING:
    from torch.fx import GraphModule


@dataclass(frozen=True)
class ExplainReport:
    """All graphs that Dynamo captured, and where and why it stopped. `str()` gives a table."""

    subject: str
    training: bool
    graphs: tuple[GraphReport, ...] = ()
    breaks: tuple[Break, ...] = ()
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        from npu_fuse.render import text

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as docs/report_format.md describes it."""
        from npu_fuse.report_json import to_dict

        return to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        from npu_fuse.report_json import to_json

        return to_json(self, indent)


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
    import torch

    from npu_fuse.targets import target_of
    from npu_fuse.untouched import dynamo_untouched, mode_for, model_untouched

    made = replace(Options.make(options), strict=False)
    target = target_of(made, planning=True)
    called = _uncompiled(model)
    subject = str(getattr(called, "__qualname__", type(called).__name__))
    graphs: list[GraphReport] = []
    stops = Stops()

    def capture_only(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from npu_fuse.backend import is_training, plan

        unchanged = _copy_graph(gm)  # a target that is not here can be planned for, and not run
        found = plan(gm, example_inputs, made, is_training(example_inputs), target)
        graphs.append(replace(found, graph_id=len(graphs)))
        return unchanged.forward

    # With symbolic sizes Dynamo makes epsilon symbolic too, AOTAutograd asks for it as a constant once it sees
    # it given to an op, and Dynamo traces again. There is no AOTAutograd here: take the constant at once.
    constants = torch._dynamo.config.patch(specialize_float=True)
    with constants, model_untouched(called, (args, kwargs)), dynamo_untouched(capture_only), mode_for(called, train):
        compiled = torch.compile(_wrapper(called), backend=capture_only, dynamic=dynamic, **_isolated())
        with stops.collecting():
            try:
                compiled(*args, **kwargs)
            except Exception as error:
                if not is_dynamo_error(error):
                    raise _cannot_run(error) from error
                stops.fatal(error)
        if stops.has_fatal:
            _check_runs(called, args, kwargs)
    return ExplainReport(subject, train, tuple(graphs), stops.breaks(), stops.failures())


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


def _copy_graph(gm: GraphModule) -> GraphModule:
    """A copy of the graph and its subgraphs that shares every tensor with the original."""
    import torch

    tensors: list[object] = [*gm.parameters(), *gm.buffers()]
    tensors += [value for m in gm.modules() for value in vars(m).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(gm, {id(tensor): tensor for tensor in tensors})


def _isolated() -> dict[str, Any]:
    """Newer torch keeps the compiled code of one `torch.compile` apart from all others if asked to."""
    import torch

    name = "isolate_recompiles"
    return {name: True} if name in inspect.signature(torch.compile).parameters else {}


def _check_runs(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `CaptureError` if the model fails in eager too: then the inputs are wrong, not Dynamo."""
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise _cannot_run(error) from error


def _cannot_run(error: BaseException) -> CaptureError:
    return CaptureError(
        f"the model cannot run with these inputs: {type(error).__name__}: {error}",
        remedy="call the model with the same inputs and without torch.compile, and make that work first",
    )
