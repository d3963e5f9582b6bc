"""doctor(): settings and patches of others, each found where it is and not where it is not; probes in a child."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
import torch._dynamo.config
from click.testing import CliRunner
from torch import nn

from npu_fuse import doctor_env, doctor_probe
from npu_fuse.cli import main

VARIABLES = (
    "HCCL_OP_EXPANSION_MODE", "HCCL_DETERMINISTIC", "USE_HUB_KERNELS", "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", "CXX",
    "TASK_QUEUE_ENABLE", "ASCEND_LAUNCH_BLOCKING", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for name in (doctor_env.VERL_PATCH, "kernels", "torch_npu"):
        monkeypatch.setitem(sys.modules, name, None)


def with_torch_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))


def levels(check):
    return {f.code: (f.level, f"{f.message} → {f.remedy}") for f in check()}


@pytest.mark.parametrize("mode", ["AI_CPU", "HOST", "HOST_TS"])
def test_expansion_modes(monkeypatch, mode):
    assert levels(doctor_env.communication) == {}
    monkeypatch.setenv("HCCL_OP_EXPANSION_MODE", mode)
    assert levels(doctor_env.communication)["hccl_expansion"][0] == "ok"


def test_aiv(monkeypatch):
    monkeypatch.setenv("HCCL_OP_EXPANSION_MODE", "AIV")
    level, text = levels(doctor_env.communication)["hccl_expansion"]
    assert level == "warning" and "MC2" in text and "deadlock" in text and "HOST" in text
    monkeypatch.setenv("HCCL_DETERMINISTIC", "true")
    assert "without effect" in levels(doctor_env.communication)["hccl_expansion"][1]


def test_no_such_mode(monkeypatch):
    monkeypatch.setenv("HCCL_OP_EXPANSION_MODE", "aiv")
    level, text = levels(doctor_env.communication)["hccl_expansion"]
    assert level == "warning" and "AI_CPU, AIV, HOST, HOST_TS" in text


def test_an_unset_mode_is_told_on_an_npu_only(monkeypatch):
    with_torch_npu(monkeypatch)
    assert levels(doctor_env.communication)["hccl_expansion"][0] == "info"


def test_verl(monkeypatch):
    assert levels(doctor_env.other_patches) == {}
    monkeypatch.setitem(sys.modules, doctor_env.VERL_PATCH, types.ModuleType("npu_patch"))
    assert levels(doctor_env.other_patches)["verl_patch"][0] == "warning"


def test_hub_kernels(monkeypatch):
    monkeypatch.setenv("USE_HUB_KERNELS", "1")
    assert "use_kernels=False" in levels(doctor_env.other_patches)["use_kernels"][1]


@pytest.mark.parametrize(("release", "said"), [("0.23.1", "itself"), ("0.24.0", "does nothing"), ("", "does nothing")])
def test_matmul_allreduce(monkeypatch, release, said):
    monkeypatch.setattr(doctor_env, "version", lambda _: release)
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", "0")
    assert levels(doctor_env.other_patches) == {}
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", "1")
    level, text = levels(doctor_env.other_patches)["matmul_allreduce"]
    assert level == "warning" and said in text


def other_forward(self, x):
    return x


def test_swapped_forwards():
    model = nn.Sequential(nn.RMSNorm(4), nn.RMSNorm(4), nn.Linear(4, 4))
    assert list(doctor_env.model_kernels(model)) == []
    for norm in model[:2]:
        norm.forward = types.MethodType(other_forward, norm)
    (found,) = doctor_env.model_kernels(model)
    assert found.level == "warning" and "2 modules RMSNorm" in found.message and __name__ in found.message


@pytest.mark.parametrize(("level", "binary", "found"), [("2", False, True), ("2", True, False), ("1", False, False)])
def test_binary_mode(monkeypatch, level, binary, found):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", level)
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(is_jit_compile_false=lambda: binary), raising=False)
    assert bool(levels(doctor_env.binary_mode)) == found


def test_compilers(monkeypatch):
    monkeypatch.setattr(doctor_env.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert levels(doctor_env.compilers) == {}
    monkeypatch.setattr(doctor_env.shutil, "which", lambda name: None)
    assert levels(doctor_env.compilers)["compiler"][0] == "warning"
    with_torch_npu(monkeypatch)
    monkeypatch.setattr(doctor_env, "_has_npu_triton", lambda: False)
    assert "triton-ascend" in levels(doctor_env.compilers)["triton"][1]


def test_recompile_limit():
    assert levels(doctor_env.recompiles) == {}
    with torch._dynamo.config.patch(recompile_limit=2):
        assert levels(doctor_env.recompiles)["recompile_limit"][0] == "warning"


def test_cann(monkeypatch):
    assert levels(doctor_env.cann) == {}
    with_torch_npu(monkeypatch)
    assert "set_env.sh" in levels(doctor_env.cann)["cann"][1]
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.setenv(name, "/opt/cann")
    assert levels(doctor_env.cann)["cann"][0] == "ok"


# ---------------------------------------------------------------------------------------------- probes


def answers(monkeypatch, *given):
    replies = iter(given)
    monkeypatch.setattr(doctor_probe, "_run", lambda code, **variables: next(replies))


def test_a_machine(monkeypatch):
    told = {"torch": "2.13.0", "torch_npu": "2.13.0", "devices": 8, "soc": "Ascend910B3", "handoffs": ["npugraph_ex"]}
    monkeypatch.setattr(doctor_probe, "installed", lambda name: True)
    answers(monkeypatch, (told, ""), ({"npu": True}, ""))
    found = levels(doctor_probe.probes)
    assert found["machine"][0] == "ok" and "8 × Ascend910B3" in found["machine"][1]
    assert "npugraph_ex" in found["handoffs"][1] and "transformers" not in found
    answers(monkeypatch, ({**told, "devices": 0}, ""), ({}, "OSError: libhccl.so"))
    found = levels(doctor_probe.probes)
    assert found["machine"][0] == "warning" and found["transformers"][0] == "error"


@pytest.mark.parametrize(
    ("died", "alone", "said"),
    [
        ("ImportError: libhccl.so", "", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        ("SIGABRT: what(): Duplicated key 'x'", "", "CPU build"),
        ("ImportError: x", "ImportError: x", "install torch again"),
    ],
)
def test_an_import_that_fails(monkeypatch, died, alone, said):
    monkeypatch.setattr(doctor_probe, "installed", lambda name: True)
    answers(monkeypatch, ({}, died), ({}, alone))
    level, text = levels(doctor_probe.probes)["import_torch"]
    assert level == "error" and said in text


def test_a_child_that_dies_is_told_by_its_signal():
    assert doctor_probe._run("print('{\"a\": 1}')") == ({"a": 1}, "")
    assert (
        doctor_probe._run("import os, sys; print('bad', file=sys.stderr, flush=True); os.abort()")[1] == "SIGABRT: bad"
    )
    assert doctor_probe._run("raise OSError('no driver')")[1] == "OSError: no driver"


def test_a_child_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(doctor_probe, "SECONDS", 0.5)
    assert "did not end" in doctor_probe._run("import time; time.sleep(60)")[1]


def test_the_command(monkeypatch):
    made = CliRunner().invoke(main, ["doctor", "--json", "--no-probe"])
    read = json.loads(made.output)
    assert (
        made.exit_code == 0
        and read["broken"] is False
        and {"code", "level", "message", "remedy"} == set(read["findings"][0])
    )
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    made = CliRunner().invoke(main, ["doctor", "--json", "--no-probe"])
    assert made.exit_code == 1 and json.loads(made.output)["broken"] is True
