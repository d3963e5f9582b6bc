"""vLLM on a CPU packs linear weights and drops the parameters, which verl then cannot update: keep them."""


def register():
    import torch
    from vllm.model_executor.layers import utils

    def keep(layer, remove_weight=False):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
