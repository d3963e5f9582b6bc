"""vllm-ascend with cudagraph_mode FULL: its compiler runs no pass, so what npugraph_ex gets is fused before.

Modules of the names and signatures of vllm-ascend 0.23.0; a real engine does the same in tests/real_vllm.
"""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import npu_fuse
from npu_fuse.integrations import vllm, vllm_ascend
from npu_fuse.options import Options

COMPILER = "vllm_ascend.compilation.compiler_interface.AscendCompiler"


class AscendCompiler:
    def __init__(self, module):
        self.module = module

    def compute_hash(self, vllm_config):
        return "0123456789"

    def compile(self, graph, example_inputs, vllm_config):
        return self.module.npugraph_ex_compile(graph, example_inputs, {}, vllm_config, None, "range", key="k")


@pytest.fixture
def ascend(monkeypatch):
    """The compiler's module; `handed` are the graphs that npugraph_ex got."""
    module = types.ModuleType(COMPILER.rpartition(".")[0])
    module.handed = []

    def npugraph_ex_compile(
        graph, example_inputs, compiler_config, vllm_config, ascend_config, compile_range, key=None, cache_dir=None
    ):
        module.handed.append(graph)
        return graph, (key, cache_dir)

    module.npugraph_ex_compile = npugraph_ex_compile
    module.AscendCompiler = type("AscendCompiler", (AscendCompiler,), {})
    for name in ("vllm_ascend", "vllm_ascend.compilation"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def config(**options):
    passes = {vllm.ASCEND_KEY: vllm.FusePass(Options.make({"target": "reference", **options}))}
    return SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=passes))


PLAIN = SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config={}))


def gated(x, w, v):
    return F.silu(x @ w) * (x @ v)


def captured():
    found = []
    inputs = (torch.randn(4, 8), torch.randn(8, 6), torch.randn(8, 6))

    def keep(gm, example_inputs):
        found.append((gm, example_inputs))
        return gm

    torch._dynamo.reset()
    torch.compile(gated, backend=keep)(*inputs)
    return *found[0], inputs


def test_the_graph_is_fused_before_it_is_handed_on(ascend):
    assert vllm_ascend.fuses_first(COMPILER, vllm.pass_of)
    assert vllm_ascend.fuses_first(COMPILER, vllm.pass_of)  # a second load of the plugin
    graph, example_inputs, inputs = captured()
    npu_fuse.clear_reports()
    made, handle = ascend.AscendCompiler(ascend).compile(graph, example_inputs, config())
    (report,) = npu_fuse.reports()
    assert (report.handoff, report.count(npu_fuse.Status.FUSED)) == ("npugraph_ex", 1)
    assert handle == ("k", None) and ascend.handed == [graph]
    assert any("swiglu" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(made(*inputs)[0], gated(*inputs))


def test_an_engine_without_the_pass_compiles_as_before(ascend):
    vllm_ascend.fuses_first(COMPILER, vllm.pass_of)
    graph, example_inputs, _ = captured()
    before = str(graph.graph)
    ascend.AscendCompiler(ascend).compile(graph, example_inputs, PLAIN)
    assert str(graph.graph) == before
    assert ascend.AscendCompiler(ascend).compute_hash(PLAIN) == "0123456789"


def test_the_cache_of_graphs_is_keyed_by_the_options(ascend):
    vllm_ascend.fuses_first(COMPILER, vllm.pass_of)
    compiler = ascend.AscendCompiler(ascend)
    keys = [compiler.compute_hash(config(**options)) for options in ({}, {}, {"skip": ["swiglu"]})]
    assert keys[0] == keys[1] != keys[2]
    assert all(key.startswith("0123456789-") for key in keys)


def test_the_compiler_is_met_when_vllm_asks_for_its_name(ascend):
    class Platform:
        @classmethod
        def get_compile_backend(cls):
            return COMPILER

    original, platform = ascend.npugraph_ex_compile, Platform()
    vllm_ascend.watch(platform, vllm.pass_of)
    vllm_ascend.watch(platform, vllm.pass_of)
    assert ascend.npugraph_ex_compile is original
    assert platform.get_compile_backend() == COMPILER
    assert ascend.npugraph_ex_compile is not original


@pytest.mark.parametrize("name", ["no_such_package.Compiler", "json.JSONDecoder"])
def test_an_unknown_compiler_is_left_alone(name):
    assert not vllm_ascend.fuses_first(name, vllm.pass_of)
