"""GGUF files of ours, read by transformers and by the package `gguf`: the same codes, rows, settings and tokens."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantize.building.build import quantize
from quantize.errors import UserError
from quantize.gguf_file import PRETOKENIZERS, _cutting, _rotary_factors, check_gguf, open_gguf
from quantize.int4.layouts import LAYOUTS
from quantize.loader import load
from quantize.model.pretrained import config_of, tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.weights import open_weights

PROMPT = torch.arange(3, 40)[None]
QUICK: dict[str, Any] = {"blocks": 2, "block_tokens": 32, "rounding": "nearest", "device": "cpu", "group_size": 64}


def model_like(tiny_llama: Path, folder: Path, kind: str, **fields: Any) -> Path:
    """Another random model beside tiny-llama's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_llama, folder)
    given = json.loads((tiny_llama / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same = {name: given[name] for name in (*sizes, "num_key_value_heads", "max_position_embeddings")}
    with quiet_libraries():
        config = AutoConfig.for_model(kind, **{**same, "tie_word_embeddings": False, "rope_theta": 5e4, **fields})
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def built(source: Path, out: Path, *variants: str) -> dict[str, Path]:
    made = quantize(str(source), variants, out, **QUICK)
    return {one.checkpoint.manifest.variant: one.checkpoint.path for one in made}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=PROMPT, use_cache=False).logits[0].float()
    return found


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # what transformers assumes
    ],
)
def test_transformers_reads_the_same_model(kind: str, fields: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    source = model_like(tiny_llama, tmp_path / f"tiny-{kind}", kind, **fields)
    paths = built(source, tmp_path / "runs", "awq-gemm", "awq-gguf")
    exact = load(paths["awq-gemm"], kernel="dequantize")
    ours = load(paths["awq-gguf"], kernel="dequantize")
    assert torch.equal(logits_of(ours.model), logits_of(exact.model))
    with quiet_libraries():
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(
            paths["awq-gguf"], gguf_file="model.gguf", dtype=torch.float32, trust_remote_code=False
        )
    difference = (logits_of(theirs) - logits_of(exact.model)).abs().max() / logits_of(exact.model).abs().max()
    assert difference < 5e-3  # an offset is scale times zero point, rounded to float16
    assert sorted(path.name for path in paths["awq-gguf"].iterdir() if path.suffix in (".gguf", ".safetensors")) == [
        "model.gguf"
    ]


def test_its_integers_are_gemms(tiny_llama: Path, tmp_path: Path) -> None:
    paths = built(tiny_llama, tmp_path / "runs", "awq-gemm", "awq-gguf")
    ours, theirs = open_gguf(paths["awq-gguf"]), open_weights(paths["awq-gemm"])
    layers = [name.removesuffix(".q4_1") for name in ours.names() if name.endswith(".q4_1")]
    assert len(layers) == 14
    for layer in layers:
        parts = {part: theirs.get(f"{layer}.{part}") for part in LAYOUTS["GEMM"].parts}
        width = len(parts["qweight"])
        exact = LAYOUTS["GEMM"].unpack(parts, width, {"group_size": 64}).weight
        found = LAYOUTS["GGUF"].unpack({"q4_1": ours.get(f"{layer}.q4_1")}, width, {"group_size": 64}).weight
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(found, part), getattr(exact, part)), (layer, part)
    tensors = {one.name: one for one in gguf.GGUFReader(paths["awq-gguf"] / "model.gguf").tensors}
    rows = gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
    parts = {part: theirs.get(f"model.layers.0.mlp.up_proj.{part}") for part in LAYOUTS["GEMM"].parts}
    dense = LAYOUTS["GEMM"].unpack(parts, 128, {"group_size": 64}).weight.dequantize().numpy()
    assert np.abs(rows - dense).max() < 1e-3 * np.abs(dense).max()


def test_the_tokenizer_is_in_it(tiny_llama: Path, tmp_path: Path) -> None:
    path = built(tiny_llama, tmp_path / "runs", "awq-gguf")["awq-gguf"]
    fields = gguf.GGUFReader(path / "model.gguf").fields
    tokenizer = tokenizer_of(path)
    held = fields["tokenizer.ggml.tokens"].contents()
    assert held == tokenizer.convert_ids_to_tokens(range(512))
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.token_type"].contents()[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    merges = json.loads((path / "tokenizer.json").read_text())["model"]["merges"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in merges]
    assert fields["tokenizer.ggml.merges"].contents() == merges
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_known_ways_to_cut_text_are_named() -> None:
    """As in the tokenizer.json of GPT-2, SmolLM, Llama 3 and Qwen2."""

    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    qwen = {**split, "pattern": {"Regex": regex.replace("{1,3}", "")}}
    digits = {"type": "Digits", "individual_digits": True}
    assert _cutting({**last, "use_regex": True}) == "gpt-2"
    assert _cutting({"type": "Sequence", "pretokenizers": [digits, {**last, "use_regex": True}]}) == "smollm"
    assert _cutting({"type": "Sequence", "pretokenizers": [split, last]}) == "llama-bpe"
    assert _cutting({"type": "Sequence", "pretokenizers": [qwen, last]}) == "qwen2"
    other = {**split, "pattern": {"Regex": r"\w+"}}
    assert _cutting({"type": "Sequence", "pretokenizers": [other, last]}) == "default"
    assert len(PRETOKENIZERS) == 4


def test_llama_3s_frequencies_are_divided_as_it_says(tiny_llama: Path, tmp_path: Path) -> None:
    """Against the formula of the Llama 3.1 release: smoothed between two wavelengths."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    source = model_like(tiny_llama, tmp_path / "llama3", "llama", head_dim=64, rope_parameters=rope)
    factors = _rotary_factors(config_of(source))
    for at, factor in enumerate(factors):
        wavelength = 2 * math.pi * 5e5 ** (at / 32)
        share = (8192 / wavelength - 1) / (4 - 1)
        expected = 1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else 1 / ((1 - share) / 8 + share)
        assert factor == pytest.approx(expected, rel=1e-4), at
    path = built(source, tmp_path / "runs", "awq-gguf")["awq-gguf"]
    held = {one.name: one.data for one in gguf.GGUFReader(path / "model.gguf").tensors}
    assert np.array_equal(held["rope_freqs.weight"], factors)
    assert logits_of(load(path, kernel="dequantize").model).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("gemma", {"head_dim": 32}, "gemma is not written as GGUF"),
        ("bloom", {}, "bloom is not written as GGUF"),  # which has no rotary embeddings
        ("opt", {}, "opt is not written as GGUF"),
        ("llama", {"hidden_act": "gelu"}, "cannot compute hidden_act gelu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "cannot compute a sliding window"),
        ("qwen3", {"head_dim": 32, "attention_bias": True}, "has no place for model.layers.0.self_attn"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaling dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, fields: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    source = model_like(tiny_llama, tmp_path / "source", kind, **fields)
    with pytest.raises(UserError, match=words):
        built(source, tmp_path / "runs", "awq-gguf")
    assert not list((tmp_path / "runs").glob("*"))


def test_a_tokenizer_without_merges_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    stated = json.loads((tiny_llama / "tokenizer.json").read_text())
    folder = shutil.copytree(tiny_llama, tmp_path / "words")
    (folder / "tokenizer.json").write_text(json.dumps({**stated, "model": {"type": "WordLevel", "vocab": {}}}))
    with pytest.raises(UserError, match="byte-pair"):
        check_gguf(folder, [])


def test_a_damaged_file_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    path = built(tiny_llama, tmp_path / "runs", "awq-gguf")["awq-gguf"]
    (path / "model.gguf").write_bytes((path / "model.gguf").read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged, or not written by `quantize`"):
        open_gguf(path)
