"""A real verl FSDP actor with npu_fuse on and off: same losses, gradient norms, weights and names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import checkpoint

pytestmark = pytest.mark.real_verl
HERE = Path(__file__).parent
ON = {"enable": True, "handoff": "aot_eager"}
LAYER = {"llama": 5, "qwen3": 7, "gemma3": 9, "glm4": 7, "qwen3_moe": 8}
"""Sites in one decoder layer: norms, two rotations, the gated MLP or the experts' gate and their routing."""
TOLERANCE = {"fp32": 64 * 2.0**-23, "bf16": 4 * 2.0**-8}
"""Relative: of means over some hundred tokens, within ten optimizer steps, in units of the dtype's step."""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def start(out, model, world, fused, *arguments, environment=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(
        OMP_NUM_THREADS="1", VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="cpu_platform", VERL_ENGINE_DEVICE="npu",
        VERL_ENGINE_VENDOR="huawei", TORCH_DEVICE_BACKEND_AUTOLOAD="0", HF_HUB_OFFLINE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), WORLD_SIZE=str(world), PYTHONPATH=os.pathsep.join([str(HERE), *sys.path[1:]]),
    )  # fmt: skip
    command = [sys.executable, str(HERE / "actor.py"), "--model", model, "--out", str(out), *arguments]
    command += ["--fused", json.dumps({"npu_fuse": fused} if fused is not None else {})]
    common = {**os.environ, **common, **(environment or {})}
    environments = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    ranks = [subprocess.Popen(command, env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for e in environments]
    try:
        return [(rank.communicate(timeout=300)[0].decode(), rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def run(out, model, world, fused, *arguments, environment=None):
    import torch

    told = start(out, model, world, fused, *arguments, environment=environment)
    assert all(code == 0 for _, code in told), "\n".join(text[-6000:] for text, code in told if code)
    return torch.load(out, weights_only=False)


def same(on, off, dtype):
    assert on["names"] == off["names"]
    assert on["state"] == off["state"]
    assert not any("_orig_mod" in name for name in (*on["state"], *on["weights"]))
    bound = TOLERANCE[dtype]
    for one, other in zip(on["norms"], off["norms"], strict=True):
        assert one == pytest.approx(other, rel=2 * bound)
    for one, other in zip(on["losses"], off["losses"], strict=True):
        assert one == pytest.approx(other, rel=bound)
    apart = sum((on["weights"][n].double() - w.double()).pow(2).sum().item() for n, w in off["weights"].items()) ** 0.5
    assert list(on["weights"]) == list(off["weights"])
    assert apart <= 4 * bound * off["moved"]


CASES = [
    ("llama", "fsdp2", 1, "fp32", ()),
    ("qwen3", "fsdp2", 2, "bf16", ()),
    ("gemma3", "fsdp", 1, "fp32", ()),
    ("glm4", "fsdp2", 2, "fp32", ("--ulysses", "2")),
    ("llama", "fsdp", 2, "fp32", ("--no-checkpointing",)),
    ("llama", "fsdp2", 1, "fp32", ("--keep-unsharded", "--lora", "4")),
    ("qwen3_moe", "fsdp2", 1, "fp32", ()),
]


@pytest.mark.parametrize(("kind", "strategy", "world", "dtype", "more"), CASES)
def test_training_is_the_same(kind, strategy, world, dtype, more, models, tmp_path):
    model = checkpoint(kind, models)
    arguments = ("--strategy", strategy, "--dtype", dtype, *more)
    off = run(tmp_path / "off.pt", model, world, None, *arguments)
    on = run(tmp_path / "on.pt", model, world, {**ON, "report_dir": str(tmp_path / "report")}, *arguments)
    same(on, off, dtype)
    assert off["moved"] > 0
    assert on["breaks"] == {}
    assert (on["fused"], on["left"]) == (on["graphs"] * LAYER[kind], 0), on["summary"]
    assert on["graphs"] >= 1
    tables = sorted((tmp_path / "report").glob("npu_fuse_verl_actor_rank*.json"))
    assert len(tables) == world
    assert json.loads(tables[0].read_text())["totals"]["by_status"].get("fused") == on["fused"]


def test_checkpoints_go_both_ways(models, tmp_path):
    model = checkpoint("llama", models)
    for first, second in ((None, ON), (ON, None)):
        folder = tmp_path / ("on_off" if first else "off_on")
        folder.mkdir()
        run(folder / "first.pt", model, 1, first, "--save", str(folder / "saved"))
        resumed = run(folder / "second.pt", model, 1, second, "--resume", str(folder / "saved"))
        straight = run(folder / "third.pt", model, 1, first, "--resume", str(folder / "saved"))
        same(resumed, straight, "fp32")


@pytest.mark.parametrize(
    ("fused", "arguments", "words"),
    [
        ({**ON, "numeric": "exact"}, (), ["unknown option 'numeric'", "numerics"]),
        ({"enable": "yes"}, (), ["enable", "True or False"]),
        (ON, ("--strategy", "fsdp", "--flat"), ["use_orig_params=True"]),
    ],
)
def test_a_wrong_setting_stops_the_run(fused, arguments, words, models, tmp_path):
    told, code = start(tmp_path / "out.pt", checkpoint("llama", models), 1, fused, *arguments)[0]
    assert code != 0
    assert all(word in told for word in words), told[-3000:]
    assert "Loading weights" not in told  # before a model is loaded
