"""A vLLM platform for CPUs with the pass key and the compile order of vllm-ascend.

aot_autograd without decompositions, then the pass manager over the functionalised graph module, and what it leaves is
run as it is. On where NPU_FUSE_TEST_PLATFORM=ascend_like.
"""

import copy
import os

KEY = "graph_fusion_manager"


def platform():
    chosen = os.environ.get("NPU_FUSE_TEST_PLATFORM") == "ascend_like"
    return "ascend_like_platform.AscendLikePlatform" if chosen else None


class PassManager:
    """Configured with no pass of its own, as on a model for which every pass of vllm-ascend is switched off."""

    def __init__(self):
        self.passes = []

    def __call__(self, graph):
        from vllm.compilation.passes.inductor_pass import get_pass_context

        compile_range = get_pass_context().compile_range
        for one in self.passes:
            if one.is_applicable_for_range(compile_range):
                one(graph)
        graph.recompile()
        return graph

    def add(self, one):
        from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass

        assert isinstance(one, VllmInductorPass)
        self.passes.append(one)

    def configure(self, config):
        """Nothing to configure."""

    def uuid(self):
        return "".join(one.uuid() for one in self.passes)


def compile_with_passes(graph, example_inputs, manager):
    """The compile function of the default path: graph breaks at attention are already split off."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import graph_returns_tuple, make_graph_return_tuple

    def inner(gm, _):
        return manager(gm)

    def run(gm, inputs):
        return aot_autograd(fw_compiler=inner, inference_compiler=inner)(gm, inputs)

    graph = copy.deepcopy(graph)
    if not graph_returns_tuple(graph):
        return make_graph_return_tuple(graph, example_inputs, run)
    return run(graph, example_inputs)
