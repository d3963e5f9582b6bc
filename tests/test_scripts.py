"""scripts/environment.sh: a torch that is there is kept, a CPU build comes first, errors stop the script.

pip is a stand-in that writes down what it is asked and "installs" torch as bare metadata.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = """
import os, pathlib, sys
args = sys.argv[1:]
with open(os.environ["PIP_STAND_IN_LOG"], "a") as log:
    print(*args, file=log)
    if "--constraint" in args:
        print("constraint", open(args[args.index("--constraint") + 1]).read().strip(), file=log)
if any(word and word in args for word in os.environ["PIP_STAND_IN_FAILS"].split(",")):
    sys.exit("no such package")
for arg in args:
    if arg.startswith("torch=="):
        folder = pathlib.Path(__file__).parents[1] / "torch-9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: torch\\nVersion: {arg[7:]}\\n")
"""


@pytest.fixture
def place(tmp_path):
    """A folder first on PYTHONPATH with the stand-in pip, and a bare environment to start from."""
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__main__.py").write_text(PIP)
    (tmp_path / "site" / "pip" / "__init__.py").write_text("")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path


def put_torch(place, version):
    folder = place / "site" / f"torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")


def use_environment(place, python, fails="", **variables):
    """Run use_environment; returns its exit status, stderr, what pip was asked, and the Python in use."""
    env = {k: v for k, v in os.environ.items() if k not in ("CONDA_PREFIX", "VIRTUAL_ENV")}
    env |= {"PYTHON": str(python), "PYTHONPATH": str(place / "site"), "NPU_FUSE_VENV": str(place / "new")}
    env |= {"PIP_STAND_IN_LOG": str(place / "log"), "PIP_STAND_IN_FAILS": fails, "NPU_FUSE_TORCH_INDEX": ""}
    script = "set -euo pipefail; . scripts/environment.sh; use_environment test; command -v python"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env | variables, text=True, capture_output=True, check=False
    )
    log = (place / "log").read_text().splitlines() if (place / "log").exists() else []
    return done.returncode, done.stderr, log, done.stdout.strip()


def installs_of_torch(log):
    return [line for line in log if line.startswith("install") and "torch==" in line]


def test_an_installed_torch_is_kept_and_pinned(place):
    put_torch(place, "2.11.0+npu7")
    status, said, log, python = use_environment(place, place / "bare/bin/python")
    assert status == 0 and "using torch 2.11.0+npu7" in said
    assert installs_of_torch(log) == [] and "constraint torch==2.11.0+npu7" in log
    assert python == str(place / "bare/bin/python")


def test_without_torch_a_cpu_build_comes_first(place):
    status, _, log, _ = use_environment(place, place / "bare/bin/python")
    assert status == 0 and "constraint torch==2.13.0+cpu" in log
    assert installs_of_torch(log) == ["install --quiet torch==2.13.0+cpu"]


def test_the_default_build_is_announced(place):
    status, said, log, _ = use_environment(place, place / "bare/bin/python", fails="torch==2.13.0+cpu")
    assert status == 0 and "several GB" in said and "NPU_FUSE_TORCH_INDEX" in said
    assert installs_of_torch(log)[-1] == "install --quiet torch==2.13.0"


def test_an_index_given_is_used(place):
    index = {"NPU_FUSE_TORCH_INDEX": "https://packages.example/cpu"}
    status, _, log, _ = use_environment(place, place / "bare/bin/python", **index)
    assert status == 0
    assert installs_of_torch(log) == ["install --quiet --index-url https://packages.example/cpu torch==2.13.0"]


def test_a_torch_that_does_not_fit_stops_the_script(place):
    put_torch(place, "2.9.0")
    status, said, log, python = use_environment(place, place / "bare/bin/python", fails="--editable")
    assert status == 1 and "beside torch 2.9.0 (it needs torch 2.10 to 2.14)" in said
    assert installs_of_torch(log) == [] and python == ""


@pytest.mark.parametrize("outside", [True, False])
def test_outside_an_environment_a_new_one_sees_the_torch_that_is_there(place, outside):
    if outside:
        put_torch(place, "2.12.0")
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    status, _, log, python = use_environment(place, base)
    assert status == 0 and python == str(place / "new/bin/python")
    config = (place / "new/pyvenv.cfg").read_text()
    assert f"include-system-site-packages = {str(outside).lower()}" in config
    assert bool(installs_of_torch(log)) is not outside


def test_an_environment_that_is_active_is_used(place):
    put_torch(place, "2.12.0")
    conda = {"CONDA_PREFIX": sys.base_prefix}
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    status, _, _, python = use_environment(place, base, **conda)
    assert status == 0 and not (place / "new").exists() and python.startswith(sys.base_prefix)
