"""vLLM on a CPU packs the weights of linear layers and of experts when it loads them, which verl then cannot update:
they are kept as they are, and the experts' packed in each call."""


def register():
    import torch
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def keep(layer, remove_weight=False):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
    pack, run = cpu_moe.cpu_prepack_moe_weight, cpu_moe.cpu_fused_moe
    if run.__name__ == "packed":  # vLLM may load a plugin twice
        return

    def packed(rows, up, down, up_bias, down_bias, weights, ids, act, isa, *rest):
        return run(rows, pack(up, isa), pack(down, isa), up_bias, down_bias, weights, ids, act, isa, *rest)

    cpu_moe.cpu_prepack_moe_weight = lambda weight, isa: weight
    cpu_moe.cpu_fused_moe = packed
