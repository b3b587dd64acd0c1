"""A small random model of every architecture that transformers has: its own class and layers, shrunk sizes."""

from collections.abc import Iterator
from typing import Any

import torch

VOCABULARY, LAST_TEXT = 512, 479
"""Special tokens of images and sounds get ids between the two."""

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "block_auto_adjust_ff_dim": False,
    "logit_scale": 1.0,
    "logits_mup_width_multiplier": 1.0,
}
"""Attributes of configs by name; those that are whole numbers are in SIZES."""

SIZES: dict[int, str] = {
    0: "num_kv_shared_layers pad_token_id",
    1: "bos_token_id n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "first_k_dense_replace num_dense_layers moe_layer_start_index moe_layer_interval mamba_n_groups n_groups "
    "mamba_ngroups spatial_merge_size temporal_patch_size adapter_merge_size",
    2: "eos_token_id num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers depth "
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads "
    "num_experts_per_tok top_k_experts moe_topk moe_k moe_top_k top_k altup_num_inputs mamba_expand expand o_groups "
    "index_topk_blocks num_filters",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads swa_num_attention_heads linear_num_heads "
    "num_sliding_attention_heads linear_num_key_heads mamba_d_conv index_n_heads zero_expert_num",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads "
    "n_mamba_heads mamba_num_heads index_block_size",
    16: "mamba_d_state ssm_state_size state_size sliding_window sliding_window_size attention_chunk_size "
    "attention_window_size local_attention_window_len index_topk chunk_size mamba_chunk_size",
    32: "mamba_dt_rank time_step_rank dt_rank head_dim global_head_dim swa_head_dim linear_head_dim kv_channels "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
    "mamba_head_dim mamba_headdim hidden_size_per_layer_input laurel_rank query_pre_attn_scalar index_head_dim "
    "block_multiple_of downsample_hidden_size adapter_rank gated_norm_rank base_channels",
    64: "moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_experts_intermediate_size shared_intermediate_size expert_intermediate_size share_expert_dim "
    "moe_shared_expert_intermediate_size router_hidden_size q_lora_rank kv_lora_rank o_lora_rank qk_head_dim "
    "attention_head_dim",
    128: "hidden_size moe_hidden_size audio_hidden_size encoder_hidden_size text_hidden_size vision_hidden_size "
    "projector_hidden_size merged_hidden_size out_hidden_size d_model n_embd dim embedding_dim word_embed_proj_dim "
    "embed_dim hidden_dim lru_width conv_dim conv_dim_out block_dim projection_dim vision_output_dim adapter_in_dim "
    "adapter_out_dim adapter_input_size projector_input_dim projector_output_dim "
    "ext_pw_out_channel nemo_conv_channels output_dim",
    256: "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim encoder_ffn_dim n_inner "
    "hidden_size_global ffn_hidden_size d_ff mlp_dim mamba_d_ssm "
    "block_ff_dim attention_hidden_size alignment_intermediate_size "
    "projection_intermediate_size max_position_embeddings n_positions max_seq_len n_ctx model_max_length max_img_size",
    512: "vocab_size encoder_hash_byte_group_vocab vocab_size_per_layer_input",
}

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
AXES = {**PLAIN, "mrope_section": [4, 6, 6]}
"""Of a head's 16 rotary frequencies, how many belong to time, height and width."""

SLIDING = ["sliding_attention", "full_attention"]
DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
CONV = {"layer_types": ["conv", "full_attention"]}
TWO_KINDS = {"num_hidden_layers": 2, "layer_types": SLIDING}
SHARED = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
"""The second hybrid layer uses the weights of the first."""

NOTE = {"num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"]}
NOTE |= {"head_dim": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "swa_head_dim": 64, "swa_v_head_dim": 32}
NOTE |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_qk_nope_head_dim": 32}
NOTE |= {"swa_q_lora_rank": 64, "swa_kv_lora_rank": 64}
NGRAMS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"], "eos_token_id": 2}
NGRAMS |= {"hidden_size": 128, "head_dim": 32, "hc_lowrank": 32, "ple_layer_ids": [1], "ple_embed_dim": 128}
NGRAMS |= {"ngram_vocab_size_base": 256, "split_ngram_parts": 1, "indexer_n_heads": 4, "indexer_kv_heads": 1}
NGRAMS |= {"indexer_head_dim": 32, "indexer_budget": 16, "indexer_compress_ratio": 4}

BUILT_WITH: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 500}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": AXES}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": NOTE,
    "dots3_note_vision_encoder": {"num_hidden_layers": 2, "pyramid_num_routed": [-1, 4]},
    "emu3": {"vocabulary_map": {"<image>": 500, "<|extra_200|>": 501}},
    "gemma4_text": TWO_KINDS,
    "gemma4_unified_text": TWO_KINDS,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"num_hidden_layers": 2},
    "qwen4_exp_text": NGRAMS,
    "zamba": {"hidden_size": 128, "num_attention_heads": 4, **SHARED},
    "zamba2": {"hidden_size": 128, "num_attention_heads": 4, **SHARED},
}
"""What the config of a model type must be made with, since it works out other values from it."""

_AXES = "cosmos3_edge_text glm4v_text glm_ocr_text paddleocr_vl_text qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text"
_NOT_GROUPED = "dots3_note_audio_encoder nemotron3_diarization_audio nemotron3_5_transcribe_asr_audio "
_NOT_GROUPED += "nemotron3_5_transcribe_word_timestamp"

CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": AXES} for name in _AXES.split()},
    **{name: {"num_key_value_heads": 4} for name in _NOT_GROUPED.split()},
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_experts": 8, "num_experts_per_tok": 2},
    "blt_global_transformer": {"hidden_size": 256, "head_dim": 64},
    "deepseek_ocr2_text": {**DENSE_AND_SPARSE, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 64},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**AXES, "mrope_section": [6, 6, 4]},
        "moe_intermediate_size": [64, 64],
    },
    "gemma3n_text": {"intermediate_size": [1024, 1024], "activation_sparsity_pattern": [0.5, 0.0]},
    "glm4v_moe_text": {"rope_parameters": {**PLAIN, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "hunyuan_vl_text": {"head_dim": 32, "rope_parameters": {**PLAIN, "mrope_section": [4, 4, 4, 4]}},
    "inkling_vision": {"patch_size": 40, "temporal_patch_size": 2, "n_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": {"channel_multiplier": [1, 1]},
    "laguna": {"num_attention_heads_per_layer": [4, 4], "layer_types": SLIDING},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": SLIDING},
    "minimax": {"block_size": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], **DENSE_AND_SPARSE},
    "ministral": {"head_dim": 32, "layer_types": SLIDING},
    "mistral4": {"head_dim": 64},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_text": {"rope_scaling_layers": [0, 1]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4, "depths": [1] * 4},
    "muse_spark_text": {"layer_rope_theta": [500000.0, 0]},
    "nemotron": {"head_dim": 32, "num_key_value_heads": 2},
    "radio": {"patch_size": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "step3p5_vision": {"mlp_ratio": 2.0},
    "step3p5": {"sliding_window": 16, "layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, PLAIN)},
    "zamba": SHARED,
    "zamba2": SHARED,
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 16, "layer_types": ["hybrid", "hybrid_sliding"]},
}
"""What the config of a model type needs besides, be it inside another."""

_OTHERS = """
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert cpmant ctrl
    data2vec-text electra ernie gemma4_assistant gemma4_unified_assistant git gpt-sw3 marian mbart megatron-bert moshi
    musicgen musicgen_melody mvp openai-gpt pegasus plbart prophetnet reformer rembert roberta roberta-prelayernorm
    roc_bert roformer rwkv trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
OTHERS = frozenset(_OTHERS.split())
"""Encoders, encoder-decoders, models of sound and images, drafts for others, and models of before 2020."""

_WRAPPERS = """
    aria aya_vision chameleon cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
    deepseek_vl_hybrid dots3_note emu3 ernie4_5_vl_moe exaone4_5 fast_vlm fuyu gemma3 gemma3n gemma4 gemma4_unified
    glm46v glm4v glm4v_moe glm5_next glm_ocr glmasr got_ocr2 granite4_vision granite_docling granite_speech
    hunyuan_vl hyperclovax_vision_v2 idefics idefics2 idefics3 inkling2 inkling_mm_model internvl janus kimi_k25
    lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6
    minicpmv4_7 minimax_m3_vl mistral3 mistral4 mistral_large4 mllama molmo2 moss_transcribe_diarize muse_glimmer
    muse_spark nemo_speechlm nemotron_h_omni ovis2 paddleocr_vl paligemma perception_lm phi4_multimodal qianfan_ocr
    qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_omni_moe_thinker qwen3_vl
    qwen3_vl_moe qwen4_exp smolvlm step3p7 unlimited_ocr vibevoice_asr video_llama_3 video_llava vipllava voxtral
"""
WRAPPERS = tuple(_WRAPPERS.split())
"""Models that see or hear, with a language model inside."""

NOT_BUILT = {
    "fast_vlm": "needs timm",
    "gemma3n": "needs timm",
    "idefics": "does not run without an image",
    "perception_lm": "needs timm",
}
"""Why there is no small model of an architecture."""


def architectures() -> list[str]:
    """The model types of decoder-only language models, wrappers aside."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in OTHERS and name not in WRAPPERS]


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random float32 model of this model type, in eval mode.

    Norms and biases are away from their initial values, and matrices large enough that the logits depend on all.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    made = CONFIG_MAPPING[name]
    kinds = {key: inner.model_type for key, inner in made.sub_configs_defaults.items()}
    inside = {key: {"model_type": kind, **BUILT_WITH[kind]} for key, kind in kinds.items() if kind in BUILT_WITH}
    config = made(**BUILT_WITH.get(name, {}), **inside)
    _shrink(config, {})
    mapping = MODEL_FOR_MULTIMODAL_LM_MAPPING if name in WRAPPERS else MODEL_FOR_CAUSAL_LM_MAPPING
    torch.manual_seed(seed)
    model = mapping[type(config)](config).eval()
    config.architectures = [type(model).__name__]
    _enliven(model)
    return model


@torch.no_grad()
def _enliven(model: Any) -> None:
    for key, parameter in model.get_decoder().named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif not parameter.any():
            parameter.normal_(0, 0.06)
        elif not any(part in key for part in ("embed", "wte", "A_log")):  # the last is an exponent
            parameter.mul_(3)


def _shrink(config: Any, tokens: dict[str, int]) -> None:
    """Small sizes for a config and those inside it, where it has them; `tokens` are the ids given out."""
    fields = config.__dict__
    for key, value in _small():
        if fields.get(key) is not None and not isinstance(fields[key], dict | list | tuple):
            setattr(config, key, value)
    for key, value in list(fields.items()):
        if key == "eos_token_id" and isinstance(value, list | tuple):
            config.eos_token_id = 2
        elif key.endswith(("_id", "_index")) and isinstance(value, int) and value >= VOCABULARY:
            setattr(config, key, tokens.setdefault(key, LAST_TEXT + 1 + len(tokens)))
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:  # every head has its own keys there
        config.num_key_value_heads = 4
    kinds = [
        key
        for key, value in fields.items()
        if isinstance(value, list | tuple) and value and isinstance(value[0], str) and key.endswith(("_types", "_type"))
    ]
    layers = max([fields.get("num_hidden_layers") or 2, *(len(dict.fromkeys(fields[key])) for key in kinds)])
    for key in kinds:  # a layer of each kind
        each = list(dict.fromkeys(fields[key]))
        setattr(config, key, (each * layers)[:layers])
    if kinds and "num_hidden_layers" in fields:
        config.num_hidden_layers = layers
    for key, value in CHANGES.get(config.model_type, {}).items():
        setattr(config, key, value)
    for value in list(fields.values()):
        if hasattr(value, "model_type"):
            _shrink(value, tokens)


def _small() -> Iterator[tuple[str, Any]]:
    yield from SMALL.items()
    for value, keys in SIZES.items():
        yield from ((key, value) for key in keys.split())
