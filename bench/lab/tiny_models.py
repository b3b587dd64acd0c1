"""A small random model of every architecture that transformers has: its own class and layers, shrunk sizes."""

from collections.abc import Iterator
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "index_topk": 16,
    "block_auto_adjust_ff_dim": False,
    "num_kv_shared_layers": 0,
}
"""Attributes of configs by name; those that many share are in SIZES."""

SIZES: dict[int, str] = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "first_k_dense_replace num_dense_layers moe_layer_start_index moe_layer_interval mamba_n_groups n_groups "
    "mamba_ngroups",
    2: "num_hidden_layers n_layer n_layers num_layers depth num_key_value_heads num_kv_heads "
    "num_global_key_value_heads num_experts_per_tok top_k_experts moe_topk moe_k moe_top_k top_k altup_num_inputs "
    "mamba_expand expand",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "linear_num_key_heads linear_num_value_heads mamba_d_conv index_n_heads",
    8: "mamba_n_heads mamba_num_heads",
    16: "mamba_d_state ssm_state_size state_size",
    32: "mamba_dt_rank time_step_rank dt_rank "
    "head_dim global_head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim mamba_headdim sliding_window "
    "attention_chunk_size attention_window_size hidden_size_per_layer_input laurel_rank query_pre_attn_scalar "
    "index_head_dim block_multiple_of",
    64: "moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "qk_head_dim",
    128: "hidden_size d_model n_embd dim word_embed_proj_dim embed_dim hidden_dim lru_width conv_dim conv_dim_out "
    "block_dim projection_dim vision_output_dim out_hidden_size",
    256: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff n_positions max_seq_len n_ctx mamba_d_ssm "
    "block_ff_dim",
    512: "vocab_size_per_layer_input",
}
IDS = (
    "image_token_id video_token_id audio_token_id image_token_index video_token_index audio_token_index "
    "vision_start_token_id vision_end_token_id image_start_token_id boi_token_index eoi_token_index boi_token_id "
    "eoi_token_id begin_image_token_id end_image_token_id boa_token_id eoa_token_id"
)
"""Tokens that are no text; each gets one of its own below the vocabulary."""

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

BUILT_WITH: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gemma4_text": TWO_KINDS,
    "gemma4_unified_text": TWO_KINDS,
    "gemma4": {"text_config": {"model_type": "gemma4_text", **TWO_KINDS}},
    "gemma4_unified": {"text_config": {"model_type": "gemma4_unified_text", **TWO_KINDS}},
}
"""What a config must be made with, since it works out other values from it."""

CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 8, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.ffn_hidden_size": 128,
        "ffn_config.moe_num_experts": 4,
        "ffn_config.moe_top_k": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 2,
        "intermediate_size": [1024, 1024],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm4v": {"text_config.rope_parameters": SECTIONS},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "falcon_mamba": {"time_step_rank": 8},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "mamba": {"time_step_rank": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 32},
    "nemotron": {"head_dim": 32, "num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen2_vl": {"text_config.rope_parameters": SECTIONS},
    "qwen2_5_vl": {"text_config.rope_parameters": SECTIONS},
}
"""What an architecture needs besides; a dot leads into a config inside."""

_OTHERS = """
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert cpmant ctrl
    data2vec-text electra emu3 ernie fuyu gemma4_assistant gemma4_unified_assistant git got_ocr2 gpt-sw3 marian
    mbart megatron-bert mistral4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody mvp openai-gpt
    pegasus plbart prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer rwkv trocr whisper xlm
    xlm-roberta xlm-roberta-xl xlnet xmod
"""
OTHERS = frozenset(_OTHERS.split())
"""Encoders, encoder-decoders, models of sound and images, drafts for others, and models of before 2019."""

_WRAPPERS = """
    gemma3 gemma4 gemma4_unified qwen3_5 qwen3_5_moe llama4 aya_vision exaone4_5 glm4v idefics3 internvl lfm2_vl
    llava llava_next llava_onevision mistral3 ovis2 paligemma qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe smolvlm
    vipllava
"""
WRAPPERS = tuple(_WRAPPERS.split())
"""Models that see or hear, with a language model inside."""

NOT_BUILT = {
    "cohere_compass_text": "its default config names layer types that its rope parameters lack",
    "gemma3n": "needs timm",
    "qwen4_exp_text": "its default config is not complete",
    "xlstm": "its sizes cannot be shrunk",
    "zamba": "its default config ties layers that it does not have",
    "zamba2": "its sizes cannot be shrunk",
    "dots3_note": "its config is not complete",
    "dots3_note_text": "its sizes cannot be shrunk",
    "kimi_linear": "its sizes cannot be shrunk",
    "qwen4_exp": "its config is not complete",
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
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = CONFIG_MAPPING[name](**BUILT_WITH.get(name, {}))
    _shrink(config)
    for key, value in CHANGES.get(name, {}).items():
        *path, leaf = key.split(".")
        inner = config
        for step in path:
            inner = getattr(inner, step)
        setattr(inner, leaf, value)
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if name in WRAPPERS else MODEL_FOR_CAUSAL_LM_MAPPING
    torch.manual_seed(seed)
    model = mapping[type(config)](config).eval()
    config.architectures = [type(model).__name__]
    _enliven(model)
    return model


@torch.no_grad()
def _enliven(model: Any) -> None:
    decoder = model.get_decoder()
    for key, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif "embed" not in key and "wte" not in key:
            parameter.mul_(3)


def _shrink(config: Any) -> None:
    """Small sizes for a config and those inside it, where it has them."""
    for key, value in _small():
        if config.__dict__.get(key) is None or isinstance(config.__dict__[key], dict | list | tuple):
            continue
        setattr(config, key, value)
    fields = config.__dict__
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
    for value in list(fields.values()):
        if type(value).__name__.endswith("Config"):
            _shrink(value)


def _small() -> Iterator[tuple[str, Any]]:
    yield from ((key, value) for key, value in SMALL.items())
    for value, keys in SIZES.items():
        yield from ((key, value) for key in keys.split())
    yield from ((key, number) for number, key in enumerate(IDS.split(), start=480))
