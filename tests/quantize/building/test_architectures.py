"""Architectures beyond Llama on small random models: scales move without changing the function, and it all loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantize
from quantize.building.build import NotAllMade
from quantize.building.job import BuildOptions
from quantize.model.pretrained import model_of
from quantize.quiet import quiet_libraries

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def make(name: str, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return getattr(transformers, f"{name}{suffix}")(config)

    return build


def wrapper(name: str) -> Callable[[], Any]:
    """A model that sees, around a Llama or a Gemma."""

    def build() -> Any:
        import transformers

        text = {**SMALL, "num_key_value_heads": 2, "head_dim": 32}
        sees: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        sees |= {"image_size": 28, "patch_size": 14}
        kinds = {"Llava": ("llama", "clip_vision_model"), "Gemma3": ("gemma3_text", "siglip_vision_model")}
        text["model_type"], sees["model_type"] = kinds[name]
        config = getattr(transformers, f"{name}Config")(
            text_config=text, vision_config=sees, image_token_id=5, image_token_index=5, mm_tokens_per_image=4
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


MODELS: dict[str, Callable[[], Any]] = {
    "llama-tied": make("Llama", num_key_value_heads=4, tie_word_embeddings=True),
    "llama-untied": make("Llama", num_key_value_heads=4, tie_word_embeddings=False),
    "mistral-grouped-query": make("Mistral", num_key_value_heads=2, sliding_window=64),
    "qwen2-biases": make("Qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": make("Qwen3", num_key_value_heads=2, head_dim=32, tie_word_embeddings=False),
    "phi3-fused-qkv": make("Phi3", num_key_value_heads=4),
    "phi3-grouped-query": make("Phi3", num_key_value_heads=2),
    "bloom-alibi": make("Bloom", n_layer=2, n_head=4),
    "mpt-alibi-tuples": make("Mpt", d_model=128, n_layers=2, n_heads=4, max_seq_len=256),
    "gemma2": make("Gemma2", num_key_value_heads=2, head_dim=32, sliding_window=64, query_pre_attn_scalar=32),
    "mixtral": make("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "gpt-oss-stacked": make(
        "GptOss", num_key_value_heads=2, num_local_experts=4, head_dim=32, layer_types=["full_attention"] * 2
    ),
    "gpt2-conv1d": make("GPT2", n_embd=128, n_layer=2, n_head=4),
    "gpt-neox-renamed": make("GPTNeoX"),
    "falcon-own-linear": make("Falcon"),
    "llava": wrapper("Llava"),
    "gemma3-wrapper": wrapper("Gemma3"),
}
NO_BNB = {
    "mixtral": "only .* can be quantized so",
    "gpt-oss-stacked": "only .* can be quantized so",
    "gpt2-conv1d": "need nn.Linear",
    "falcon-own-linear": "need nn.Linear",
}
"""Models that bitsandbytes has no storage for, and what is said then."""


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    """A random model with norms, biases and weights away from their initial values."""
    torch.manual_seed(0)
    with quiet_libraries():
        built = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(3)
    return built


def logits(model: Any, tokens: int = 100) -> torch.Tensor:
    ids = torch.arange(tokens).view(1, tokens) * 7 % 500 + 3
    with torch.inference_mode():
        out: torch.Tensor = model(ids).logits.float()
    return out


def test_quantized_and_loaded_it_follows_the_source(
    model: Any, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    source, kind = tmp_path / "source", request.node.callspec.params["model"]
    with quiet_libraries():
        model.half().save_pretrained(source)
        before = logits(model_of(source, dtype=torch.float32))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    options = BuildOptions(blocks=8, block_tokens=64, device="cpu", rounding="gptq")
    if kind in NO_BNB:
        with pytest.raises(NotAllMade, match=f"no bnb-8bit.*{NO_BNB[kind]}") as raised:
            quantize.quantize(str(source), ["all"], tmp_path / "out", options=options)
        made = raised.value.made
        assert raised.value.refused.keys() == {"bnb-4bit", "bnb-8bit"}
    else:
        made = quantize.quantize(str(source), ["all"], tmp_path / "out", options=options)
    assert {"fp16", "awq-gemm", "awq-gemv"} <= {item.checkpoint.variant.name for item in made}
    for item in made:
        loaded = quantize.load(item.checkpoint.path)
        after = logits(loaded.model)
        error_of = float((after - before).norm() / before.norm())
        limit = {"fp16": 1e-2, "bnb-8bit": 0.1}.get(item.checkpoint.manifest.variant, 0.5)
        assert error_of < limit, (item.checkpoint.manifest.variant, error_of)


def test_a_mixture_says_how_many_tokens_each_expert_saw(tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with quiet_libraries():
        built = make("Qwen3Moe", num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=2,
                     moe_intermediate_size=64)()  # fmt: skip
        built.half().save_pretrained(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "moe" / name).write_bytes((tiny_llama / name).read_bytes())
    options = BuildOptions(blocks=2, block_tokens=16, device="cpu")
    [item] = quantize.quantize(str(tmp_path / "moe"), ["awq-gemm"], tmp_path / "out", options=options)
    tokens = {one["name"]: one["tokens"] for one in item.checkpoint.manifest.layers}
    experts = [tokens[f"model.layers.0.mlp.experts.{number}.down_proj"] for number in range(16)]
    assert sum(experts) == 2 * 2 * 16
    assert tokens["model.layers.0.self_attn.q_proj"] is None
    with quiet_libraries():
        before, after = (
            logits(model_of(tmp_path / "moe", dtype=torch.float32)),
            logits(quantize.load(item.checkpoint.path).model),
        )
    assert float((after - before).norm() / before.norm()) < 0.5
