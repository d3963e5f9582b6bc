"""What the generic reducer makes small: configuration key -> tiny value. Data only."""

from __future__ import annotations

VOCAB = 128


def _all(value: int, keys: str) -> dict[str, int]:
    return dict.fromkeys(keys.split(), value)


WIDTHS = _all(
    64,
    """hidden_size d_model n_embd dim embed_dim lru_width embedding_size hidden_size_global
    word_embed_proj_dim out_hidden_size text_hidden_size encoder_hidden_size projection_dim
    input_embedding_size output_embedding_size vision_output_dim emb_dim backbone_hidden_size
    projector_hidden_size audio_embed_dim decoder_hidden_size entity_embed_dim embedding_dim
    input_size output_channels moe_intermediate_size shared_expert_intermediate_size
    moe_shared_expert_intermediate_size share_expert_dim shared_experts_intermediate_size""",
) | _all(
    128,
    """intermediate_size ffn_dim n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff
    shared_intermediate_size intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim
    d_inner expert_ffn_hidden_size projection_intermediate_size mamba_d_ssm""",
)

DEPTHS = _all(
    2,
    """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers depth conf_num_hidden_layers num_blocks layers""",
)

HEADS = _all(
    4,
    """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
    num_sliding_attention_heads linear_num_value_heads linear_num_heads index_n_heads
    conf_num_attention_heads num_query_groups""",
) | _all(
    2,
    """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads
    num_global_key_value_heads""",
)

HEAD_WIDTHS = _all(
    16,
    """head_dim kv_channels attention_head_dim d_kv dim_head d_head swa_head_dim v_head_dim
    linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim global_head_dim
    attention_head_size swa_v_head_dim query_pre_attn_scalar qk_nope_head_dim kv_lora_rank
    o_lora_rank""",
) | {"qk_rope_head_dim": 8, "qk_head_dim": 24, "q_lora_rank": 32, "rotary_dim": 8}

LENGTHS = (
    _all(VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size decoder_vocab_size")
    | _all(
        128,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
    max_source_positions model_max_length original_max_position_embeddings attention_chunk_size""",
    )
    | _all(8, "sliding_window sliding_window_size attention_window_size")
)

EXPERTS = (
    _all(4, "num_experts num_local_experts n_routed_experts moe_num_experts num_local_expert zero_expert_num")
    | _all(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts")
    | _all(1, "n_group num_expert_group topk_group first_k_dense_replace num_dense_layers moe_layer_start_index")
)

STATE_SPACE = _all(16, "state_size mamba_d_state ssm_state_size d_state mamba_chunk_size chunk_size") | {
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "n_mamba_heads": 2,
    "n_groups": 2,
    "mamba_n_groups": 1,
}

TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
}

OTHER = {
    "image_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 16,
    "index_topk": 8,
    "index_topk_blocks": 2,
    "index_block_size": 8,
    "hc_lowrank": 16,
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 101,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
    "router_hidden_size": 32,
    "adapter_rank": 8,
    "gated_norm_rank": 8,
    "d_rel": 8,
    "rel_extent": 32,
    "conf_conv_kernel_size": 3,
    "num_query_tokens": 4,
    "type_vocab_size": 2,
    "attention_dropout": 0.0,
    "lambda_std_dev": 0.1,
    "max_window_layers": 1,
    "o_groups": 2,
}

SMALL: dict[str, int | float] = {
    **WIDTHS,
    **DEPTHS,
    **HEADS,
    **HEAD_WIDTHS,
    **LENGTHS,
    **EXPERTS,
    **STATE_SPACE,
    **TOKENS,
    **OTHER,
}

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# Token ids that must fall inside the tiny vocabulary, and differ from each other and from the text's ids.
TOKEN_ID_KEYS = frozenset(
    """image_token_id video_token_id audio_token_id vision_start_token_id vision_end_token_id
    image_token_index video_token_index audio_token_index image_start_token_id image_end_token_id
    video_start_token_id video_end_token_id boi_token_id eoi_token_id boa_token_id eoa_token_id
    boi_token_index eoi_token_index eoa_token_index vision_token_id audio_start_token_id
    audio_end_token_id user_token_id im_start_id im_end_id im_newline_id image_bos_token_id
    audio_bos_token_id image_patch_id frame_start_token_id frame_end_token_id eod_token_id
    low_res_image_start_token_id cls_token_id mask_token_id forced_eos_token_id _pad_token_id""".split()
)
FIRST_TOKEN_ID = 40
