"""What the generic reducer gets wrong, per architecture: configuration values written last. Data only."""

from __future__ import annotations

from typing import Any

Kwargs = dict[str, Any]


def _mrope(section: list[int], **more: Any) -> Kwargs:
    default = {"rope_type": "default", "rope_theta": 10000.0}
    return {"text_config": {"rope_parameters": {**default, "mrope_section": section, **more}}}


_LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
_COMPASS = {
    "layer_types": _LOCAL_GLOBAL,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
    },
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_DOTS3 = {
    "audio_config": {"adapter_input_size": 64, "hidden_size": 64, "adapter_out_dim": 64},
    "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
}
_ZAMBA_LAYERS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_VQ_WORDS = {"<image>": 39, "IMGIMGAAZ": 40, "IMGIMGABZ": 41}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": _LOCAL_GLOBAL,
}

_CODEC = {
    "num_filters": 8,
    "upsample_groups": 64,
    "codebook_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
}
_GLM_ROPE = _mrope([2, 3, 3], partial_rotary_factor=1.0)

# Arguments without which the configuration class cannot even be built with its defaults.
DEFAULTS: dict[str, Kwargs] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
}

CONFIG: dict[str, Kwargs] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots3_note": _DOTS3,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _LOCAL_GLOBAL * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 4],
        "max_position_embeddings": 16,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
    },
    "xlm": {"n_langs": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _ZAMBA_LAYERS,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _ZAMBA_LAYERS,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
    # Image-text models, text part.
    "itt:chameleon": {"vocabulary_map": _VQ_WORDS},
    "itt:cohere_compass": {"text_config": _COMPASS},
    "itt:deepseek_ocr2": {
        "text_config": {
            "layer_types": ["full_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse"],
            "num_hidden_layers": 2,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "itt:diffusion_gemma": {
        "text_config": {
            "top_k_experts": 2,
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "enable_moe_block": True,
        }
    },
    "itt:dots3_note": {**_DOTS3, "audio_token_id": 41},
    "itt:emu3": {"vocabulary_map": _VQ_WORDS},
    "itt:ernie4_5_vl_moe": _mrope([3, 3, 2]),
    "itt:glm46v": _mrope([2, 3, 3], partial_rotary_factor=1.0),
    "itt:glm4v": _mrope([2, 3, 3], partial_rotary_factor=1.0),
    "itt:glm4v_moe": _mrope([1, 1, 2], partial_rotary_factor=0.5),
    "itt:glm5_next": {"text_config": {"index_topk": 16}},
    "itt:glm_ocr": _mrope([2, 3, 3], partial_rotary_factor=1.0),
    "itt:glmga": _mrope([2, 3, 3], partial_rotary_factor=1.0),
    "itt:granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "2/4"},
    "itt:hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            **_mrope([2, 2, 2, 2], xdrope_section=[2, 2, 2, 2])["text_config"],
        }
    },
    "itt:molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "itt:nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "itt:paddleocr_vl": _mrope([2, 3, 3]),
    "itt:qwen2_5_omni_thinker": _mrope([2, 3, 3]),
    "itt:qwen2_5_vl": _mrope([2, 3, 3]),
    "itt:qwen2_vl": _mrope([2, 3, 3]),
    "itt:step3p7": {"text_config": {"sliding_window": 8}},
}
# Encoders, encoder-decoders, towers.
CONFIG |= {
    "model:autoformer": {"prediction_length": 8},
    "model:csm": {"codec_config": _CODEC, "codebook_pad_token_id": 3},
    "model:esm": {"vocab_size": 128, "mask_token_id": 3},
    "model:glm_image": _GLM_ROPE,
    "model:glm_image_text": _GLM_ROPE["text_config"],
    "model:gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "model:informer": {"prediction_length": 8},
    "model:kyutai_speech_to_text": {
        "codec_config": _CODEC,
        "audio_pad_token_id": 4,
        "audio_bos_token_id": 5,
        "codebook_vocab_size": 64,
        "num_codebooks": 2,
    },
    "model:mimi": _CODEC,
    "model:mimi_decoder": _CODEC,
    "model:mimi_encoder": _CODEC,
    "model:nemo_speechlm": {"head_config": {"audio_hidden_size": 64}},
    "model:nemotron3_5_transcribe_audio": {"head_config": {"audio_hidden_size": 64}},
    "model:nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "model:pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "model:pocket_tts_audio_tokenizer": _CODEC,
    "model:pocket_tts_audio_tokenizer_decoder": _CODEC,
    "model:pocket_tts_audio_tokenizer_encoder": _CODEC,
    "model:moonshine_streaming": {"encoder_config": {"hidden_size": 64}},
    "model:time_series_transformer": {"prediction_length": 8},
}
for _name in ("itt:glm46v", "itt:glmga"):
    CONFIG[_name]["text_config"]["model_type"] = "glm4v_text"
