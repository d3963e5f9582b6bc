"""The command line: `npu-fuse explain | check | chips | doctor | agree | verify-device`.

Exit codes: 0 all is well; 1 the answer is no (`check`: counts differ; `explain`: Dynamo captured nothing or
failed; `doctor`: something keeps npu_fuse from working); 2 the command cannot be carried out as given
(unknown architecture, wrong option, a model that does not run).
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from npu_fuse import __version__
from npu_fuse.cli_agree import agree
from npu_fuse.cli_device import doctor, verify_device
from npu_fuse.errors import NpuFuseError

if TYPE_CHECKING:
    from npu_fuse.explain import ExplainReport

DTYPES = ("bfloat16", "float16", "float32", "float64")
PIPE_WIDTH = 120
_OPTION_NAMES = ("target", "soc", "handoff", "numerics", "fuse", "skip", "dump")

_Command = TypeVar("_Command", bound=Callable[..., Any])


class CannotRun(click.ClickException):
    """Ends the command with exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="npu-fuse")
def main() -> None:
    """Fuse RMSNorm, rotary embeddings and gated MLPs in any model, prove it, and explain every site.

    Exit codes: 0 all is well, 1 the answer is no, 2 the command cannot be carried out as given.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # nothing is ever downloaded
        os.environ[name] = "1"


main.add_command(agree)
main.add_command(doctor)
main.add_command(verify_device)


def _model_options(command: _Command) -> _Command:
    """TARGET and the options that `explain` and `check` share."""
    for decorate in reversed(
        (
            click.argument("model", metavar="TARGET"),
            click.option("--train", is_flag=True, help="With gradients, in training mode; else inference."),
            click.option("--dtype", type=click.Choice(DTYPES), help="Of an architecture. [default: bfloat16]"),
            click.option("--dynamic", is_flag=True, help="Compile with symbolic sizes."),
            click.option("--full", is_flag=True, help="An architecture at its own sizes instead of tiny."),
            click.option("--layers", type=click.IntRange(1), help="The depth of an architecture."),
            click.option("--target", help="auto, reference or npu: which ops to use."),
            click.option("--soc", help="The chip to plan for, with --target npu."),
            click.option("--handoff", help="The torch.compile backend that would get the graphs."),
            click.option("--numerics", help="fused, or exact: bit-equal rewrites only."),
            click.option("--fuse", metavar="OPS", help="Only these ops, separated by commas."),
            click.option("--skip", metavar="OPS", help="Not these ops."),
            click.option("--dump", metavar="DIR", help="Write readable graphs before and after each step."),
        )
    ):
        command = decorate(command)
    return command


@main.command()
@_model_options
@click.option("--vllm", "in_vllm", is_flag=True, help="In vLLM's graphs: an engine is started on TARGET, made tiny.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/report_format.md), not a table.")
def explain(model: str, in_vllm: bool, as_json: bool, **settings: Any) -> None:
    """Report what is fused in TARGET, what is not, and why.

    TARGET is a transformers model type (llama) or class (LlamaForCausalLM), a folder with a config.json or
    such a file: built tiny with random weights and without network. Or it is package.module:callable, which
    returns (model, inputs), where inputs are a dict, a tuple or a tensor.
    """
    report = (_report_in_vllm if in_vllm else _report)(model, settings)
    click.echo(report.to_json()) if as_json else _print(report)
    if not report.graphs or any(failure.fatal for failure in report.failures):
        sys.exit(1)


@main.command()
@_model_options
@click.option("--require", required=True, metavar="OP=N,...", help="How many sites of which op must be fused.")
def check(model: str, require: str, **settings: Any) -> None:
    """Exit with 1, and print the difference, unless exactly the required sites of TARGET are fused.

    Ops that are not named may have any count. TARGET is the same as for `explain`.
    """
    required = _requirements(require)
    lines = differences(_report(model, settings), required)
    for line in lines:
        click.echo(line)
    if lines:
        sys.exit(1)
    click.echo("as required: " + ", ".join(f"{op} {count}" for op, count in required.items()))


@main.command()
@click.argument("models", metavar="TARGET...", nargs=-1, required=True)
@click.option("--soc", "chips", multiple=True, help="A chip; may be repeated. [default: one of each family]")
@click.option("--train", is_flag=True, help="With gradients, in training mode; else inference.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--dynamic", is_flag=True, help="Compile with symbolic sizes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def chips(models: tuple[str, ...], chips: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Print what each chip fuses of each TARGET (a model as for `explain`), and what it refuses and why.

    No chip has to be here, nor torch_npu.
    """
    import json

    from npu_fuse import chip_table
    from npu_fuse.chip_names import EXAMPLES

    wanted = chips or EXAMPLES
    left = dict.fromkeys((*_OPTION_NAMES, "full", "layers"))
    found = {
        model: {
            chip: chip_table.coverage(_report(model, {**left, **settings, "target": "npu", "soc": chip}))
            for chip in wanted
        }
        for model in models
    }
    if as_json:
        click.echo(json.dumps(chip_table.to_dict(found), indent=2))
        return
    for line in chip_table.lines(["model", "op", *wanted], chip_table.rows(found, wanted)):
        click.echo(line)
    for reason in chip_table.reasons(found):
        click.echo(f"  {reason}")


# ----------------------------------------------------------------------------------------------------- check


def differences(report: ExplainReport, required: Mapping[str, int]) -> list[str]:
    """What is other than required: counts, and for each op short of sites the reasons; [] if all is well."""
    from npu_fuse.render import place
    from npu_fuse.report import Status

    sites = [site for graph in report.graphs for site in graph.sites]
    fused = Counter(op for site in sites if site.status is Status.FUSED for op in (site.op, *site.contains))
    lines = []
    for op, count in required.items():
        if fused[op] == count:
            continue
        lines.append(f"{op}: required {count}, fused {fused[op]} ({fused[op] - count:+d})")
        left = Counter(
            f"    {site.status.value.replace('_', ' ')} at {place(site)}: {site.reason}"
            for site in sites
            if site.op == op and site.status is not Status.FUSED
        )
        lines += [reason + (f" (x{n})" if n > 1 else "") for reason, n in left.items()]
    if lines:
        lines += [f"Dynamo: {f.error}: {f.reason}" for f in report.failures]
    return lines


def _requirements(text: str) -> dict[str, int]:
    from npu_fuse.option_checks import known_ops

    made = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, _, count = part.partition("=")
        op, count = op.strip(), count.strip()
        if not count.isdigit():
            raise click.BadParameter(f"{part!r} is not of the form op=number", param_hint="--require")
        if op not in known_ops():
            close = difflib.get_close_matches(op, known_ops(), n=1)
            hint = f"did you mean {close[0]}?" if close else f"the ops are {', '.join(known_ops())}"
            raise click.BadParameter(f"there is no op {op!r}; {hint}", param_hint="--require")
        made[op] = int(count)
    if not made:
        raise click.BadParameter("names no op; write rms_norm=9,rotary_mul=4", param_hint="--require")
    return made


# ---------------------------------------------------------------------------------------------- model, report


def _report(name: str, settings: dict[str, Any]) -> ExplainReport:
    from npu_fuse.explain import explain as run
    from npu_fuse.options import Options

    try:
        options = Options.make({k: v for k in _OPTION_NAMES if (v := settings[k]) is not None})
        model, args, kwargs = _model(name, settings)
        dynamic = True if settings["dynamic"] else None
        return run(model, *args, train=settings["train"], options=options, dynamic=dynamic, **kwargs)
    except NpuFuseError as error:
        raise CannotRun(str(error)) from error


def _report_in_vllm(name: str, settings: dict[str, Any]) -> ExplainReport:
    from npu_fuse.integrations.vllm_explain import explain_vllm

    given = [key for key in ("train", "dynamic", "full", "handoff") if settings[key]]
    if given:
        raise click.UsageError(f"--{given[0]} has no meaning in vLLM's graphs; leave it out")
    options = {k: v for k in _OPTION_NAMES if (v := settings[k]) is not None}
    try:
        return explain_vllm(name, settings["dtype"] or "bfloat16", options, settings["layers"])
    except NpuFuseError as error:
        raise CannotRun(str(error)) from error


def _model(name: str, settings: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model and its inputs, positional and by name."""
    if ":" in name and not os.path.exists(name):
        for key in ("dtype", "full", "layers"):
            if settings[key]:
                raise click.UsageError(f"--{key} is for architectures; {name} makes its own model")
        return _from_callable(name)
    import torch

    from npu_fuse.architectures import build

    dtype = getattr(torch, settings["dtype"] or "bfloat16")
    model, inputs = build(name, full=settings["full"], layers=settings["layers"], dtype=dtype)
    return model, (), inputs


def _from_callable(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            made = getattr(made, part)
        made = made()
    except Exception as error:
        raise CannotRun(f"{name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise CannotRun(f"{name} must return (model, inputs), not {type(made).__name__}")
    model, inputs = made
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return model, tuple(inputs), {}
    raise CannotRun(f"{name}: inputs must be a dict, a tuple or a tensor, not {type(inputs).__name__}")


def _print(report: ExplainReport) -> None:
    from rich.console import Console

    from npu_fuse.render import MIN_WIDTH, renderable

    console = Console()
    console.width = max(console.width, MIN_WIDTH) if console.is_terminal else PIPE_WIDTH
    console.print(renderable(report))


if __name__ == "__main__":
    main()
