"""doctor(): each fault is found where it is, and not where it is not; looking changes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch._dynamo.eval_frame

from npu_fuse import doctor as doctor_attribute
from npu_fuse.options import CACHE_DIR_VARIABLE

module = sys.modules["npu_fuse.doctor"]  # the name npu_fuse.doctor is the function

VARIABLES = [
    "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_SUPPRESS_ERRORS",
    "TASK_QUEUE_ENABLE",
    "ASCEND_LAUNCH_BLOCKING",
    "PYTORCH_NPU_ALLOC_CONF",
    "LD_LIBRARY_PATH",
    CACHE_DIR_VARIABLE,
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)


def find(code):
    """(level, message and remedy) of every finding with this code."""
    return [(f.level, f"{f.message} → {f.remedy}") for f in doctor_attribute() if f.code == code]


def only(code):
    (found,) = find(code)
    return found


def install_torch_npu(monkeypatch, tmp_path, version, loaded=False, **npu):
    """Metadata and an importable module that fails if anyone imports it."""
    (tmp_path / f"torch_npu-{version}.dist-info").mkdir()
    (tmp_path / f"torch_npu-{version}.dist-info" / "METADATA").write_text(f"Name: torch_npu\nVersion: {version}\n")
    (tmp_path / "torch_npu.py").write_text("raise RuntimeError('doctor must not import this')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu")
    if loaded:
        fake = types.ModuleType("torch_npu")
        fake._C = types.SimpleNamespace(_npu_getOption=npu.get)
        monkeypatch.setitem(sys.modules, "torch_npu", fake)
        monkeypatch.setattr(torch, "npu", types.SimpleNamespace(**npu), raising=False)


def same_release():
    return ".".join(torch.__version__.split(".")[:2]) + ".0"


def test_a_healthy_process_has_nothing_worse_than_info():
    found = doctor_attribute()
    assert {f.code for f in found} == {
        "torch",
        "torch_npu",
        "entry_point",
        "dynamo",
        "task_queue",
        "cache_dir",
    }
    assert [str(f) for f in found if f.level not in ("ok", "info")] == []


def test_every_complaint_has_a_remedy(monkeypatch, tmp_path):
    install_torch_npu(monkeypatch, tmp_path, "1.0.0")
    for variable in ("TORCHDYNAMO_DISABLE", "ASCEND_LAUNCH_BLOCKING", "TORCHDYNAMO_SUPPRESS_ERRORS"):
        monkeypatch.setenv(variable, "1")
    complaints = [f for f in doctor_attribute() if f.level in ("warning", "error")]
    assert len(complaints) >= 4 and all(f.remedy and f.message for f in complaints)


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("2.9.1", "error"),
        ("2.10.0", "ok"),
        ("2.14.1+cpu", "ok"),
        ("2.15.0a0+git1", "warning"),
        ("3.0.0", "warning"),
    ],
)
def test_torch_version(monkeypatch, version, level):
    monkeypatch.setattr(torch, "__version__", version)
    assert only("torch")[0] == level


def test_the_range_is_that_of_the_package():
    (torch_need,) = [need for need in metadata.requires("npu-fuse") or [] if re.match(r"torch\b(?!-)", need)]
    (low_major, low), (high_major, high) = module.OLDEST_TORCH, module.NEWEST_TORCH
    assert f">={low_major}.{low}" in torch_need and f"<{high_major}.{high + 1}" in torch_need


def test_a_torch_that_cannot_be_imported_is_reported(tmp_path):
    """As where torch loads a torch_npu without CANN: doctor must still run, in a fresh process."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open')\n")
    (tmp_path / "torch_npu.py").write_text("")
    code = "from npu_fuse.doctor import doctor; print(*doctor(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        text=True,
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("error   torch: import torch failed: ImportError: libhccl.so")
    assert "set_env.sh" in first


def test_torch_npu_for_another_torch(monkeypatch, tmp_path):
    install_torch_npu(monkeypatch, tmp_path, "2.1.0.post9")
    level, text = only("torch_npu")
    assert level == "error" and "2.1.0.post9" in text and "install torch_npu" in text


def test_torch_npu_without_cann_and_not_loaded(monkeypatch, tmp_path):
    install_torch_npu(monkeypatch, tmp_path, same_release())
    level, text = only("torch_npu")
    assert level == "error" and "libascendcl.so" in text and "set_env.sh" in text
    (tmp_path / "libascendcl.so").write_text("")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    level, text = only("torch_npu")
    assert level == "warning" and "import torch_npu before compiling" in text


@pytest.mark.parametrize(("available", "level"), [(True, "ok"), (False, "warning")])
def test_torch_npu_loaded(monkeypatch, tmp_path, available, level):
    npu = {"is_available": lambda: available, "device_count": lambda: 8}
    install_torch_npu(monkeypatch, tmp_path, same_release(), loaded=True, **npu)
    assert only("torch_npu")[0] == level


def test_entry_point_missing_or_of_another(monkeypatch):
    for values in ([], ["other:backend"]):
        entries = [types.SimpleNamespace(value=value) for value in values]
        monkeypatch.setattr(metadata, "entry_points", lambda entries=entries, **_: entries)
        level, text = only("entry_point")
        assert level == "error" and (values or ["nothing"])[0] in text


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_dynamo_off_by_environment(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert only("dynamo")[0] == "error" and variable in only("dynamo")[1]
    monkeypatch.setenv(variable, "0")
    assert only("dynamo")[0] == "ok"


def test_dynamo_off_by_config():
    with torch._dynamo.config.patch(disable=True):  # monkeypatch would hide the setting afterwards
        assert only("dynamo")[0] == "error"


def test_dynamo_off_by_stance():
    with torch.compiler.set_stance("force_eager"):
        assert only("dynamo")[0] == "error" and "set_stance" in only("dynamo")[1]
    assert only("dynamo")[0] == "ok"


def test_torch_compile_replaced(monkeypatch):
    def dummy_compile(*args, **kwargs):
        return lambda model: model

    monkeypatch.setattr(torch, "compile", dummy_compile)
    level, text = only("dynamo")
    assert level == "error" and "dummy_compile" in text and "torch._dynamo.optimize" in text


def test_errors_suppressed():
    with torch._dynamo.config.patch(suppress_errors=True):
        assert only("dynamo")[0] == "warning"


def test_task_queue(monkeypatch, tmp_path):
    for level in ("0", "1"):
        monkeypatch.setenv("TASK_QUEUE_ENABLE", level)
        assert only("task_queue")[0] == "ok"
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    level, text = only("task_queue")
    assert level == "warning" and "TASK_QUEUE_ENABLE=1" in text
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")  # turns the queue off whatever its level
    assert only("task_queue")[0] == "ok" and only("launch_blocking")[0] == "warning"
    monkeypatch.delenv("ASCEND_LAUNCH_BLOCKING")
    npu = {"get_task_queue_enable": lambda: 1, "is_available": lambda: False}
    install_torch_npu(monkeypatch, tmp_path, same_release(), loaded=True, **npu)
    assert only("task_queue")[0] == "ok"  # changed at run time
    assert find("launch_blocking") == []


def test_allocator_settings_that_capture_refuses(monkeypatch):
    assert find("alloc_conf") == []
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "a:1, pin_memory_expandable_segments: True")
    assert only("alloc_conf")[0] == "warning"


@pytest.mark.parametrize(("value", "level"), [(b"enable", "warning"), (b"disable", "ok"), (b"", "ok")])
def test_internal_format(monkeypatch, tmp_path, value, level):
    npu = {"ALLOW_INTERNAL_FORMAT": value, "is_available": lambda: False}
    install_torch_npu(monkeypatch, tmp_path, same_release(), loaded=True, **npu)
    assert only("internal_format")[0] == level


def test_cache_dir(monkeypatch, tmp_path):
    assert only("cache_dir")[0] == "info"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "new" / "folder"))
    assert only("cache_dir")[0] == "ok" and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "file" / "below"))
    level, text = only("cache_dir")
    assert level == "warning" and f"{tmp_path / 'file'} is not a folder" in text
    monkeypatch.setattr(module.os, "access", lambda path, how: Path(path) != tmp_path)
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "new"))
    assert only("cache_dir")[0] == "warning"


def test_looking_changes_nothing():
    code = """
import sys, torch
from npu_fuse.doctor import doctor
before = set(sys.modules)
doctor(); doctor()
grown = {name.split(".")[0] for name in set(sys.modules) - before}
print("torch._dynamo" in sys.modules, "torch_npu" in sys.modules, sorted(grown & {"torch", "transformers"}))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "False False []\n"
