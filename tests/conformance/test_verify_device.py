"""`npu-fuse verify-device` on the stand-in: all is well, and a kernel that gives other numbers is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npu_fuse import device_checks, verify_device

pytestmark = pytest.mark.real_wheel


def run(*args: str, soc: str = "Ascend910B3", devices: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "npu_fuse.cli", "verify-device", *args]
    env = os.environ | {"NPU_HOST_SOC": soc, "NPU_HOST_DEVICES": str(devices)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=540, env=env)


def test_all_is_well(tmp_path: Path) -> None:
    report, limits = tmp_path / "report.json", tmp_path / "limits.json"
    done = run("--json", str(report), "--limits", str(limits))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    statuses = {c["status"] for c in told["checks"]}
    assert statuses == {"ok", "skipped"} and len(told["checks"]) > 150
    assert [c["name"] for c in told["checks"] if c["status"] == "skipped"] == [
        "probe: matmul and all-reduce on two ranks"
    ]
    assert json.loads(limits.read_text()) == {"version": 1, "soc": told["device"]["soc"], "refuse": []}


def test_what_an_old_chip_does_not_have_is_skipped(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run("--only", "npu_clipped_swiglu", "--only", "limit", "--json", str(report), soc="Ascend310P3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {c["status"] for c in json.loads(report.read_text())["checks"]} == {"skipped"}


def test_other_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in device_checks.CASES if c.op == "npu_swiglu")
    op = torch.ops.npu.npu_swiglu.default
    for share, status in ((1.0, "ok"), (1.01, "wrong")):
        monkeypatch.setattr(device_checks, "npu", lambda _, share=share: lambda *a, **k: op(*a, **k) * share)
        check = verify_device.run("call: npu_swiglu float32", lambda: device_checks.call(case, torch.float32))
        assert check.status == status, check.fact


def test_two_devices(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run("--only", "two ranks", "--json", str(report), devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [c["status"] for c in json.loads(report.read_text())["checks"]] == ["ok"]
