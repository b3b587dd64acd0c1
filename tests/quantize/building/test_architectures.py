"""Architectures beyond Llama on small random models: scales move without changing the function, and it all loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantize
from quantize.building.job import BuildOptions
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
        return getattr(transformers, f"{name}ForCausalLM")(config)

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
}


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


def test_quantized_and_loaded_it_follows_the_source(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with quiet_libraries():
        model.half().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    before = logits(model.float())
    options = BuildOptions(blocks=8, block_tokens=64, device="cpu", rounding="gptq")
    for item in quantize.quantize(str(source), ["all"], tmp_path / "out", options=options):
        loaded = quantize.load(item.checkpoint.path)
        after = logits(loaded.model)
        error = float((after - before).norm() / before.norm())
        limit = {"fp16": 1e-2, "bnb-8bit": 0.1}.get(item.checkpoint.manifest.variant, 0.5)
        assert error < limit, (item.checkpoint.manifest.variant, error)
