"""verl's vLLM server under the actor's switch, and the plugin that vLLM loads, on stand-ins for both."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import types
from types import SimpleNamespace

import pytest

import npu_fuse
from npu_fuse.errors import OptionError
from npu_fuse.integrations import verl_rollout
from npu_fuse.integrations.vllm import ASCEND_KEY, FusePass, settle

ON = {"npu_fuse": {"enable": True, "numerics": "exact", "handoff": "aot_eager", "strict": True}}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NPU_FUSE_VLLM", "VLLM_PLUGINS", "TASK_QUEUE_ENABLE", "VLLM_ASCEND_TASK_QUEUE_ENABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    logging.getLogger("npu_fuse").setLevel(logging.NOTSET)


def as_ray_does(server):
    """The class that Ray runs: derived, with a wrapper of every method that goes to the method of before."""

    class Class(server):
        pass

    for name in ("launch_server", "_preprocess_engine_kwargs"):
        method = getattr(Class, name)

        @functools.wraps(method)
        def resume(self, *args, method=method):
            return method(self, *args)

        setattr(Class, name, resume)
    return Class


def launched(options, eager=False, vllm=None):
    """The arguments with which a server under these options starts vLLM."""

    class Server:
        model_config = SimpleNamespace(fused_kernel_options=options)
        config = SimpleNamespace(enforce_eager=eager)

        def launch_server(self):
            kwargs = dict(vllm or {})
            self._preprocess_engine_kwargs(kwargs)
            return kwargs

        def _preprocess_engine_kwargs(self, kwargs):
            kwargs["seen"] = True

    actor = as_ray_does(Server)  # before verl imports its external library
    launch = actor.launch_server
    module = types.SimpleNamespace(vLLMHttpServer=Server)
    verl_rollout.install(module)
    verl_rollout.install(module)
    made = launch(actor())
    assert made.pop("seen")
    return made


def test_the_switch_reaches_the_server():
    kwargs = launched(ON, vllm={"additional_config": json.dumps({"own": 1})})
    assert os.environ["NPU_FUSE_VLLM"] == "1"
    assert kwargs == {"additional_config": {"own": 1, "npu_fuse": {"numerics": "exact"}}}


@pytest.mark.parametrize(
    "options", [{}, {"npu_fuse": {"enable": False}}, {"npu_fuse": {"enable": True, "rollout": False}}]
)
def test_without_the_switch_nothing_is_touched(options):
    assert launched(options) == {}
    assert "NPU_FUSE_VLLM" not in os.environ


def test_what_is_told_is_seen_where_verl_shows_errors_only(capsys, monkeypatch):
    logger, root = logging.getLogger("npu_fuse"), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logger, "handlers", [])
    launched(ON)
    launched(ON)
    assert len(logger.handlers) == 1
    assert "npu_fuse's pass is switched on" in capsys.readouterr().err


def test_an_eager_rollout_is_told_of(caplog):
    assert launched(ON, eager=True) == {}
    assert "enforce_eager=False" in caplog.text and "NPU_FUSE_VLLM" not in os.environ


@pytest.mark.parametrize(
    ("variables", "vllm", "words"),
    [
        ({"TASK_QUEUE_ENABLE": "2"}, {}, "VLLM_ASCEND_TASK_QUEUE_ENABLE=1"),
        ({"VLLM_PLUGINS": "ascend"}, {}, "add npu_fuse to VLLM_PLUGINS"),
        ({}, {"compilation_config": {"mode": 0}}, "compilation_config.mode"),
    ],
)
def test_what_excludes_each_other_stops_the_start(variables, vllm, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=words):
        launched(ON, vllm=vllm)


def test_a_task_queue_for_training_alone_is_no_conflict(monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv("VLLM_ASCEND_TASK_QUEUE_ENABLE", "1")
    assert launched(ON)["additional_config"]["npu_fuse"] == {"numerics": "exact"}


# --- the plugin --------------------------------------------------------------------------------------


def config(passes=None, additional=None, eager=False, mode="VLLM_COMPILE", capture="FULL_AND_PIECEWISE", backend=""):
    """As much of a `VllmConfig` as the plugin reads."""
    compilation = SimpleNamespace(
        inductor_compile_config=dict(passes or {}), inductor_passes={}, backend=backend,
        mode=SimpleNamespace(name=mode), cudagraph_mode=SimpleNamespace(name=capture),
    )  # fmt: skip
    model = SimpleNamespace(enforce_eager=eager)
    return SimpleNamespace(compilation_config=compilation, additional_config=additional or {}, model_config=model)


@pytest.fixture
def ascend(monkeypatch):
    platforms = types.ModuleType("vllm.platforms")
    compiler = "vllm_ascend.another.release.Compiler"
    platforms.current_platform = SimpleNamespace(pass_key=ASCEND_KEY, get_compile_backend=lambda: compiler)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


def test_the_plugin_sets_the_platforms_key(ascend, monkeypatch, caplog):
    untouched = config()
    settle(untouched)
    assert untouched.compilation_config.inductor_compile_config == {}
    monkeypatch.setenv("NPU_FUSE_VLLM", "1")
    made = config(additional={"npu_fuse": {"numerics": "exact", "target": "reference"}})
    settle(made)
    settle(made)  # each process of vLLM looks again
    (fuse,) = made.compilation_config.inductor_compile_config.values()
    assert type(fuse) is FusePass and fuse.chosen().numerics == "exact"
    assert made.compilation_config.inductor_passes == {ASCEND_KEY: "npu_fuse.vllm_pass"}
    assert caplog.records == []


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (dict(eager=True), "enforce_eager"),
        (dict(mode="NONE"), "mode to 3"),
        (dict(capture="FULL_DECODE_ONLY"), "FULL_AND_PIECEWISE"),
        (dict(capture="FULL"), "enable_npugraph_ex"),
        (dict(passes={"post_grad_custom_post_pass": npu_fuse.vllm_pass}), "rename the key to graph_fusion_manager"),
        (dict(passes={ASCEND_KEY: print}), "another pass stands under"),
    ],
)
def test_where_no_pass_runs_the_user_is_told(made, words, ascend, monkeypatch, caplog):
    monkeypatch.setenv("NPU_FUSE_VLLM", "1")
    settle(config(**made))
    assert any(words in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)


def test_npugraph_ex_switched_off_is_no_obstacle(ascend, monkeypatch, caplog):
    monkeypatch.setenv("NPU_FUSE_VLLM", "1")
    settle(config(capture="FULL", additional={"ascend_compilation_config": {"enable_npugraph_ex": False}}))
    assert caplog.records == []


def test_a_wrong_option_stops_the_start(ascend):
    with pytest.raises(OptionError, match="numerics"):
        settle(config(passes={ASCEND_KEY: npu_fuse.vllm_pass}, additional={"npu_fuse": {"numeric": "exact"}}))
