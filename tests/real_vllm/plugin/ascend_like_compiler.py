"""The compiler class, apart from the platform: it needs vLLM's configuration, which needs the platform."""

import torch
from ascend_like import KEY, compile_with_passes
from vllm.compilation.compiler_interface import CompilerInterface


class Compiler(CompilerInterface):
    name = "ascend_like"

    def compute_hash(self, vllm_config):
        return "ascend_like"

    def compile(self, graph, example_inputs, compiler_config, compile_range, key=None):
        with torch._functorch.config.patch(force_autograd_cache=False, bundled_autograd_cache=False):
            return compile_with_passes(graph, example_inputs, compiler_config[KEY]), None
