"""`npu-fuse doctor` and `npu-fuse verify-device`: what the machine is, and what its NPU really does."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from npu_fuse.errors import NpuFuseError


@click.command("verify-device")
@click.option(
    "--only", multiple=True, metavar="WORD", help="Only checks with this word in their name; may be repeated."
)
@click.option("--json", "report", type=click.Path(dir_okay=False), help="Write all answers, to attach to an issue.")
@click.option("--limits", type=click.Path(dir_okay=False), help="Write what failed, for NPU_FUSE_LIMITS.")
@click.option("--list", "listed", is_flag=True, help="Only print the names of the checks.")
def verify_device(only: tuple[str, ...], report: str | None, limits: str | None, listed: bool) -> None:
    """Make every call that npu_fuse emits once on the NPU of this machine, and hold it against float64.

    Calls and gradients in each dtype, compiled blocks in training, the edges of documented limits, capture and
    replay, and what no document says. Exit code 1 where something fails.
    """
    from rich.console import Console
    from rich.progress import track

    from npu_fuse import device_limits
    from npu_fuse import verify_device as verifier

    console = Console(stderr=True)
    try:
        machine = verifier.device()
    except NpuFuseError as error:
        click.echo(f"npu-fuse: {error}", err=True)
        sys.exit(2)
    wanted = verifier.names(only)
    if listed:
        click.echo("\n".join(wanted))
        return
    if not wanted:
        click.echo(f"npu-fuse: no check has {' or '.join(only)} in its name; --list prints all", err=True)
        sys.exit(2)
    found = []
    for check in track(verifier.verify(wanted), f"{machine['soc']}", total=len(wanted), console=console):
        found.append(check)
        if check.status != "ok" or check.name.startswith(("probe", "limit")):
            click.echo(f"{check.status:7} {check.name}: {check.fact}")
    counts = Counter(check.status for check in found)
    click.echo(", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    if report:
        Path(report).write_text(verifier.to_json(machine, found) + "\n", encoding="utf-8")
    if limits:
        refused = [entry for check in found if check.bad for entry in verifier.refused(check)]
        device_limits.write(limits, machine["soc"], refused)
        click.echo(f"{len(refused)} ops and dtypes to leave alone: NPU_FUSE_LIMITS={limits}")
    if any(check.bad for check in found):
        sys.exit(1)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not lines.")
@click.option("--no-probe", is_flag=True, help="Start no child process: only look at this one and its environment.")
@click.option(
    "--verl",
    "run",
    metavar="CONFIG_OR_OVERRIDES",
    help="Answer the tuning guide for a verl run instead: a launch script, a YAML file, or overrides.",
)
def doctor(run: str | None, as_json: bool, no_probe: bool) -> None:
    """Say what on this machine keeps npu_fuse from working, or from being fast."""
    import json
    from dataclasses import asdict

    from npu_fuse.doctor import doctor as look
    from npu_fuse.integrations.verl_doctor import verl_doctor

    try:
        findings = look(probe=not no_probe) if run is None else verl_doctor(run)
    except NpuFuseError as error:
        click.echo(f"npu-fuse: {error}", err=True)
        sys.exit(2)
    broken = any(finding.level == "error" for finding in findings)
    if as_json:
        click.echo(json.dumps({"broken": broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(str(finding))
    if broken:
        sys.exit(1)
