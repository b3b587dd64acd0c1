"""Random weights in a real model's shape."""

import json
from pathlib import Path

import pytest
import torch

import quantize
from quantize.building.job import BuildOptions
from quantize.cli import main
from quantize.dummy import WEIGHT_STD, DummyWeights, dummy_config, dummy_weights
from quantize.errors import UserError
from quantize.source import open_source

FAST = BuildOptions(blocks=2, block_tokens=32, device="cpu")


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_name_stands_for_the_published_shape(cached: Path) -> None:
    name, config = dummy_config("mistral-7b")
    assert name == "dummy-mistral-7b"
    shape = [config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")]
    assert shape == [4096, 14336, 32, 8]
    source = open_source("dummy:mistral-7b")
    assert source.facts.kind == "dummy"
    assert source.folder == open_source("dummy:mistral-7b").folder
    assert json.loads((source.folder / "config.json").read_text())["model_type"] == "mistral"


def test_weights_are_random_the_same_each_time_and_drawn_when_asked_for() -> None:
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=True
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    weights = dummy_weights(model, torch.device("cpu"))
    assert "lm_head.weight" not in weights.names()
    name = "model.layers.0.mlp.down_proj.weight"
    assert weights.shape(name) == (128, 256)
    drawn = weights.get(name)
    assert drawn.dtype == weights.dtype(name) == torch.float16
    assert torch.equal(drawn, weights.get(name))
    assert float(drawn.float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(drawn.t(), weights.get("model.layers.0.mlp.up_proj.weight"))
    assert torch.equal(weights.get("model.norm.weight"), torch.ones(128).half())


def test_every_variant_can_be_made_and_loaded(cached: Path, tiny_llama: Path) -> None:
    source = f"dummy:{tiny_llama / 'config.json'}"
    for item in quantize.quantize(source, ["all", "rtn"], cached / "out", options=FAST):
        manifest = item.checkpoint.manifest
        assert manifest.source.kind == "dummy"
        assert manifest.source.weights_sha256 is None
        loaded = quantize.load(item.checkpoint.path)
        assert loaded.tokenizer is None
        with torch.inference_mode():
            assert torch.isfinite(loaded.model(torch.arange(20).view(1, 20)).logits).all()


def test_what_is_no_shape_is_refused(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"not one of llama-2-7b, llama-3.1-8b"):
        open_source("dummy:gpt-5")
    no_type = cached / "config.json"
    no_type.write_text("{}")
    with pytest.raises(UserError, match="model_type"):
        open_source(f"dummy:{no_type}")
    assert main([f"dummy:{cached}/none.json", "--out", str(cached / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: dummy:")


def test_weights_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = DummyWeights({"a": (40, 20)}, torch.device("cpu"))
    whole = drawn.get("a")
    monkeypatch.setattr("quantize.dummy.DRAWN_TOGETHER", 64)
    assert torch.equal(drawn.get("a"), whole)
    assert 0.8 < float(whole.float().std()) / WEIGHT_STD < 1.2
