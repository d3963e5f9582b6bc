"""A whole GRPO run of stock verl on CPUs, started by the example's own script, and what it left behind."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 1800
PRECISION = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
ALIKE = (
    "actor_rollout_ref.model.external_lib=[npu_fuse.integrations.verl,cpu_offload,seeded_loop]",
    "actor_rollout_ref.rollout.agent.default_agent_loop=seeded",
    "data.seed=1",
    "actor_rollout_ref.rollout.dtype=float32",
    f"+actor_rollout_ref.actor.fsdp_config.mixed_precision={PRECISION}",
    f"+actor_rollout_ref.ref.fsdp_config.mixed_precision={PRECISION}",
)
"""What makes two runs draw the same answers: a seed for each, and one precision everywhere."""


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    metrics: list[dict[str, float]]
    """verl's own, by step."""
    tables: dict[str, dict]
    """npu_fuse's JSON tables by file name."""

    def curve(self, name: str) -> list[float]:
        return [step[name] for step in self.metrics]


@contextmanager
def started(folder: Path, switch: bool, steps: int, *overrides: str, environment: dict[str, str] | None = None):
    """The running trainer, its output in `folder/output`. At the end nothing of it is left, however it ended."""
    ray = tempfile.mkdtemp(prefix="ray_", dir="/tmp")  # the names of its sockets have a limit
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "FOLDER": str(folder), "SWITCH": str(switch), "STEPS": str(steps), "LIMIT": str(LIMIT), "RAY_TMPDIR": ray,
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE / "plugin", ROOT))), "PYTHONUNBUFFERED": "1",
        "RAY_worker_niceness": "0",  # by default they yield to whatever else runs on the machine
    }  # fmt: skip
    shared = set(Path("/dev/shm").iterdir())
    with (folder / "output").open("wb") as output:
        script = [str(ROOT / "examples" / "verl" / "grpo_cpu.sh"), "trainer.logger=[console,file]", *overrides]
        process = subprocess.Popen(
            ["bash", *script], env={**os.environ, **given, **(environment or {})}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for leader in (process.pid, *workers(ray)):
                with suppress(ProcessLookupError):
                    os.kill(leader, signal.SIGKILL)
            process.wait()
    shutil.rmtree(ray, ignore_errors=True)
    for left in set(Path("/dev/shm").iterdir()) - shared:  # vLLM and verl leave theirs where a worker dies
        if left.name.startswith(("psm_", "verl_weights_")):
            left.unlink(missing_ok=True)


def workers(ray: str) -> list[int]:
    """The processes that were started for this run: they inherit its RAY_TMPDIR."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RAY_TMPDIR={ray}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def finish(folder: Path, process: subprocess.Popen) -> Run:
    code = process.wait(timeout=LIMIT + 60)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    tables = {path.name: json.loads(path.read_text()) for path in sorted((folder / "npu_fuse").glob("*.json"))}
    return Run(code, (folder / "output").read_text(errors="replace"), [json.loads(x)["data"] for x in lines], tables)
