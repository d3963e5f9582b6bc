"""`npu-fuse agree`: whether fusing changes how far a trainer's log-probabilities are from its rollout's."""

from __future__ import annotations

import os

import click

from npu_fuse.errors import NpuFuseError


@click.command()
@click.argument("model", metavar="TARGET")
@click.option("--dtype", type=click.Choice(("bfloat16", "float16", "float32")), default="bfloat16", show_default=True)
@click.option("--handoff", default="aot_eager", show_default=True, help="Who compiles the actor's graphs.")
@click.option("--numerics", default="fused", show_default=True, help="fused, or exact: bit-equal rewrites only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not lines.")
def agree(model: str, dtype: str, handoff: str, numerics: str, as_json: bool) -> None:
    """Compare the log-probabilities of an actor (transformers) and a rollout (vLLM), each plain and fused.

    TARGET is the folder of a checkpoint, or an architecture as for `explain`, built tiny. The tokens are sampled by
    the plain rollout.
    """
    from npu_fuse.integrations import agreement

    try:
        found = agreement.agree(model, dtype, {"handoff": handoff, "numerics": numerics})
    except NpuFuseError as error:
        click.echo(f"npu-fuse: {error}", err=True)
        raise SystemExit(2) from error
    click.echo(agreement.to_json(found) if as_json else os.linesep.join(map(str, found)))
