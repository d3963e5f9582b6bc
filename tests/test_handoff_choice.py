"""Which compiler gets a graph, and the reason that the report gives for it."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from npu_fuse import handoff_choice
from npu_fuse.handoff_choice import choose
from npu_fuse.options import Options
from npu_fuse.targets import REFERENCE, Target

HERE = Target("npu", "npu", "Ascend910B3")


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for variable in ("TASK_QUEUE_ENABLE", "ASCEND_LAUNCH_BLOCKING"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(handoff_choice, "_told", set())
    monkeypatch.setattr(handoff_choice, "_registered", lambda: ["npugraph_ex", "npugraphs"])


@pytest.mark.parametrize(
    ("target", "training", "name"),
    [
        (REFERENCE, False, "inductor"), (HERE, False, "npugraph_ex"), (HERE, True, "aot_eager"),
        (Target("npu", "npu", "Ascend310P3"), False, "aot_eager"),
        (Target("npu", "npu", "Ascend910B3", present=False), False, "npugraph_ex"),
    ],
)  # fmt: skip
def test_defaults(target, training, name):
    chosen = choose(Options(), target, training)
    assert chosen.name == name and chosen.reason and not chosen.given


def test_a_release_without_npugraph_ex(monkeypatch):
    monkeypatch.setattr(handoff_choice, "_registered", lambda: [])
    assert choose(Options(), HERE, False).name == "aot_eager"


@pytest.mark.parametrize("asked", [None, "npugraph_ex", "npugraphs"])
def test_task_queue_level_2_refuses_to_capture(monkeypatch, caplog, asked):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    with caplog.at_level(logging.WARNING, "npu_fuse"):
        for _ in range(2):
            chosen = choose(Options(handoff=asked), HERE, False)
    assert chosen.name == "aot_eager" and "TASK_QUEUE_ENABLE=1" in chosen.reason
    assert len([r for r in caplog.records if "TASK_QUEUE_ENABLE" in r.message]) == 1
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")  # the queue is off then
    assert choose(Options(handoff=asked), HERE, False).name == (asked or "npugraph_ex")


def test_the_level_at_run_time_counts(monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(get_task_queue_enable=lambda: 1), raising=False)
    assert choose(Options(), HERE, False).name == "npugraph_ex"


def test_npugraphs_without_a_triton_for_the_npu(monkeypatch, tmp_path):
    """Its Inductor changes torch's settings before it fails: they are put back."""
    package = tmp_path / "torch_npu" / "_inductor"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    lines = [
        "from torch._inductor import config",
        "config.fallback_random = True",
        "raise RuntimeError('0 active drivers')",
    ]
    (package / "config.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "torch_npu"]:
        monkeypatch.delitem(sys.modules, name)
    __import__("torch_npu")
    try:
        chosen = choose(Options(handoff="npugraphs"), HERE, False)
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "torch_npu"]:
            del sys.modules[name]
    assert chosen.name == "aot_eager" and "0 active drivers" in chosen.reason and "triton-ascend" in chosen.reason
    assert torch._inductor.config.fallback_random is False
