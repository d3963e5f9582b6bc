"""What is built and installed: passes/ as npu_fuse.passes, nothing else leaked, entry points that resolve."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code, cwd, *flags):
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, text=True, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


def build(tree, kind):
    """Build with the backend's own hook, without pip and its network; returns the file."""
    out = tree.parent / f"{tree.name}-{kind}"
    out.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    status, _, errors = run(code, tree)
    assert status == 0, errors
    return next(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of a copy of this tree."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    tree.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("npu_fuse", "passes", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    return build(tree, "wheel"), build(tree, "sdist")


def python_files():
    """Every Python file that must ship, as a path in the wheel."""
    found = [path.relative_to(ROOT) for path in (ROOT / "npu_fuse").rglob("*.py")]  # does not follow links
    found += [Path("npu_fuse") / path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")]
    return {str(path) for path in found}


def test_passes_is_a_committed_link():
    link = ROOT / "npu_fuse" / "passes"
    assert link.is_symlink() and link.resolve() == ROOT / "passes"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-s", "npu_fuse/passes"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert listed.stdout.startswith("120000 ")


def test_the_wheel_has_every_module_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        others = {Path(name).name for name in wheel.namelist() if ".dist-info/" in name}
    assert names == python_files() | {"npu_fuse/py.typed"}
    assert "npu_fuse/passes/__init__.py" in names
    assert {"LICENSE", "entry_points.txt"} <= others


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    again = build(next(tmp_path.iterdir()), "wheel")
    with zipfile.ZipFile(built[0]) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist() if i.filename.endswith(".py")} == {
            i.filename: i.CRC for i in second.infolist() if i.filename.endswith(".py")
        }


def test_the_wheel_imports_by_itself(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import npu_fuse.passes as p; print(p.__file__)\n"
        "try: import passes\nexcept ModuleNotFoundError: print('no leak')"
    )
    status, printed, errors = run(code, tmp_path.parent, "-I")
    assert status == 0, errors
    assert printed.splitlines() == [str(tmp_path / "npu_fuse" / "passes" / "__init__.py"), "no leak"]


def test_importing_the_folder_by_another_name_says_what_to_write():
    status, _, errors = run("import passes", ROOT)
    assert status == 1 and errors.splitlines()[-1].startswith("ImportError: write `import npu_fuse.passes`")


def test_torch_finds_the_backend_without_an_import():
    code = "import torch, sys; print('npu_fuse' in torch.compiler.list_backends(), 'npu_fuse' in sys.modules)"
    assert run(code, ROOT.parent)[:2] == (0, "True False\n")


@pytest.mark.parametrize(("group", "name"), [("torch_dynamo_backends", "npu_fuse"), ("console_scripts", "npu-fuse")])
def test_entry_points_resolve(group, name):
    (entry,) = metadata.entry_points(group=group, name=name)
    assert callable(entry.load())


def test_no_optional_package_is_needed_to_import():
    """Hard dependencies are torch, rich and click; the integrations need what they integrate."""
    code = """
import importlib, pkgutil, sys
for name in ("transformers", "torch_npu", "verl", "vllm", "hypothesis", "pytest", "yaml"):
    sys.modules[name] = None
import npu_fuse
for module in pkgutil.walk_packages(npu_fuse.__path__, "npu_fuse."):
    if ".integrations." not in module.name:
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("npu_fuse")]))
"""
    status, printed, errors = run(code, ROOT.parent)
    assert status == 0, errors
    assert int(printed) >= 8


def test_the_version_is_the_installed_one():
    assert importlib.import_module("npu_fuse").__version__ == metadata.version("npu-fuse")
