"""Tiny random checkpoints, saved once per kind: what vLLM and transformers both load."""

from pathlib import Path

SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 64, "query_pre_attn_scalar": 32}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
}


def checkpoint(kind: str, folder: Path, seed: int = 0) -> str:
    """The folder of a checkpoint in float32 with weights large enough that logits differ."""
    import torch
    import transformers

    path = folder / f"{kind}_{seed}"
    if not (path / "config.json").exists():
        config_class, model_class, extra = KINDS[kind]
        torch.manual_seed(seed)
        config = getattr(transformers, config_class)(**{**SIZES, **extra})
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(path)
    return str(path)
