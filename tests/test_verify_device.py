"""`npu-fuse verify-device` without a device: processes that end early, what failed is left alone, wrong files."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import npu_fuse
from npu_fuse import device_limits, verify_device
from npu_fuse.cli import main
from npu_fuse.device_checks import Skipped
from npu_fuse.errors import OptionError, TargetError
from npu_fuse.verify_device import Check

CHILD = """
    import json, os, sys, time
    for name in sys.stdin.read().splitlines():
        print("npu_fuse-check " + json.dumps({"begins": name}), flush=True)
        if name == "call: dies 1":
            print("the kernel is gone", file=sys.stderr, flush=True)
            os.abort()
        if name == "call: hangs 1":
            time.sleep(60)
        print("noise of the driver", flush=True)
        print("npu_fuse-check " + json.dumps({"name": name, "status": "ok", "fact": "", "seconds": 0}), flush=True)
"""


def test_a_check_that_ends_or_hangs_its_process_is_one_failed_check() -> None:
    names = ["call: a 1", "call: dies 1", "call: b 1", "call: hangs 1", "call: c 1"]
    command = [sys.executable, "-c", textwrap.dedent(CHILD)]
    found = list(verify_device.verify(names, command, silence=3.0))
    assert [c.name for c in found] == names
    assert [c.status for c in found] == ["ok", "failed", "ok", "failed", "ok"]
    assert "the kernel is gone" in found[1].fact and "said nothing" in found[3].fact


def test_a_process_that_cannot_start_fails_every_check() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no driver')"]
    found = list(verify_device.verify(["call: a 1", "call: b 1"], command))
    assert [c.status for c in found] == ["failed", "failed"] and "no driver" in found[0].fact


def test_statuses() -> None:
    def check(error: Exception | None) -> Check:
        def made() -> str:
            if error is not None:
                raise error
            return "seen"

        return verify_device.run("call: x", made)

    assert (check(None).status, check(None).fact) == ("ok", "seen")
    assert check(AssertionError("off by 3")).status == "wrong"
    assert check(Skipped("one device")).status == "skipped"
    assert check(RuntimeError("561002")).fact == "RuntimeError: 561002"


def test_only_bad_calls_and_gradients_become_limits() -> None:
    bad = Check("call: npu_rms_norm-f32_gamma float16", "wrong", "off")
    assert verify_device.refused(bad) == [("npu_rms_norm", "float16", "wrong, call: off")]
    assert not verify_device.refused(Check("call: npu_swiglu float16", "ok", ""))
    assert not verify_device.refused(Check("probe: capture and replay", "wrong", "off"))


def test_every_case_has_an_op_of_the_chips_table() -> None:
    from npu_fuse.device_cases import CASES
    from npu_fuse.targets.chips import SUPPORT

    assert {case.op for case in CASES} <= set(SUPPORT)


def test_without_a_device_it_says_so() -> None:
    if hasattr(torch, "npu") and torch.npu.is_available():
        pytest.skip("an NPU is here")
    with pytest.raises(TargetError, match="no NPU here"):
        verify_device.device()
    done = CliRunner().invoke(main, ["verify-device"])
    assert done.exit_code == 2 and "no NPU here" in done.stderr


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def planned(dtype: torch.dtype = torch.float32, soc: str = "Ascend910B3") -> npu_fuse.SiteReport:
    options = {"target": "npu", "soc": soc}
    report = npu_fuse.explain(Norm().to(dtype), torch.ones(2, 16, dtype=dtype), options=options)
    return report.graphs[0].sites[0]


def test_what_failed_on_the_chip_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "limits.json"
    device_limits.write(str(path), "Ascend910B3", [("npu_rms_norm", "float32", "wrong, call: off by 40 roundings")])
    assert planned().status is npu_fuse.Status.FUSED
    monkeypatch.setenv(device_limits.VARIABLE, str(path))
    site = planned()
    assert site.status is npu_fuse.Status.REFUSED_BY_TARGET and "off by 40 roundings" in site.reason
    assert planned(torch.float16).status is npu_fuse.Status.FUSED
    assert planned(soc="Ascend910_9391").status is npu_fuse.Status.FUSED  # another chip's limits


def test_compile_caches_know_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "limits.json"
    device_limits.write(str(path), "Ascend910B3", [])
    monkeypatch.setenv(device_limits.VARIABLE, str(path))
    one = device_limits.content()
    device_limits.write(str(path), "Ascend910B3", [("npu_swiglu", "float16", "wrong")])
    assert device_limits.content() != one


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9, "soc": "", "refuse": []}', '{"version": 1}'])
def test_a_wrong_file_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "limits.json"
    path.write_text(text)
    monkeypatch.setenv(device_limits.VARIABLE, str(path))
    with pytest.raises(OptionError, match="is no file of limits"):
        device_limits.measured_limit("npu_rms_norm", "float32", "Ascend910B3")


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device_limits.VARIABLE, os.path.join("no", "such", "file"))
    with pytest.raises(OptionError, match="is no file of limits"):
        device_limits.measured_limit("npu_rms_norm", "float32", None)


def test_the_answer_as_json() -> None:
    made = json.loads(verify_device.to_json({"soc": "Ascend910B3"}, [Check("call: a", "ok", "fine", 0.5)]))
    assert made["version"] == 1 and made["checks"][0]["name"] == "call: a"
