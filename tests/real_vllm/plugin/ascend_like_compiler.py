"""The compiler class, apart from the platform: it needs vLLM's configuration, which needs the platform.

With NPU_FUSE_TEST_NPUGRAPH_EX=1 it skips the pass manager, as vllm-ascend's does with cudagraph_mode FULL.
"""

import copy
import os

import torch
from ascend_like import KEY, compile_with_passes
from vllm.compilation.compiler_interface import CompilerInterface


def npugraph_ex_compile(graph, example_inputs, compiler_config, vllm_config, compile_range, key=None, cache_dir=None):
    """Where vllm-ascend has npugraph_ex compile Dynamo's graph: here it runs as it is."""
    return graph, None


class Compiler(CompilerInterface):
    name = "ascend_like"

    def compute_hash(self, vllm_config):
        self.vllm_config = vllm_config
        return "ascend_like"

    def compile(self, graph, example_inputs, compiler_config, compile_range, key=None):
        if os.environ.get("NPU_FUSE_TEST_NPUGRAPH_EX") == "1":
            graph = copy.deepcopy(graph)
            return npugraph_ex_compile(graph, example_inputs, compiler_config, self.vllm_config, compile_range, key)
        with torch._functorch.config.patch(force_autograd_cache=False, bundled_autograd_cache=False):
            return compile_with_passes(graph, example_inputs, compiler_config[KEY]), None
