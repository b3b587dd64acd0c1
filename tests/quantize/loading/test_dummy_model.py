"""Random weights in a variant's own form: the memory of a real checkpoint of the same shape, and it runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import quantize
from quantize.building.job import BuildOptions
from quantize.dummy import random_int4
from quantize.errors import UserError
from quantize.int4.weight import Int4Weight
from quantize.kernels import KERNELS
from quantize.kernels.base import Int4Linear, KernelFault
from quantize.loader import load_dummy
from quantize.loading.int4_layers import keep_half_embeddings
from quantize.variant import VARIANTS

CONFIG = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shape"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "awq-gguf"])  # which has a tokenizer
def test_it_takes_the_memory_of_a_checkpoint_and_runs(variant: str, config: Path, tmp_path: Path) -> None:
    options = BuildOptions(blocks=2, block_tokens=32, device="cpu", rounding="nearest")
    (built,) = quantize.quantize(f"dummy:{config}", [variant], tmp_path / "out", options=options)
    real = quantize.load(built.checkpoint.path, device="cpu", kernel="dequantize" if "awq" in variant else None)
    dummy = load_dummy(str(config), variant, device="cpu", kernel="dequantize" if "awq" in variant else None)
    assert dummy.weights_bytes == real.weights_bytes
    assert [dummy.kernel(tokens) for tokens in (1, 1024)] == [real.kernel(tokens) for tokens in (1, 1024)]
    assert dummy.compute_dtype == torch.float32
    assert {name: type(module) for name, module in dummy.model.named_modules()} == {
        name: type(module) for name, module in real.model.named_modules()
    }
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        logits = dummy.model(input_ids=ids).logits
    assert logits.shape == (1, 12, 320)
    assert bool(torch.isfinite(logits).all())
    assert not [name for name, tensor in dummy.model.named_parameters() if tensor.is_meta]


def test_the_same_name_gives_the_same_weights() -> None:
    first, again = (random_int4("layer", 64, 128, 32, torch.device("cpu")) for _ in range(2))
    other = random_int4("other", 64, 128, 32, torch.device("cpu"))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales, again.scales)
    assert not torch.equal(first.codes, other.codes)
    assert set(first.codes.flatten().tolist()) == set(range(16))
    assert float(first.dequantize().std()) == pytest.approx(0.02, rel=0.15)


def test_what_cannot_be_is_one_line(config: Path) -> None:
    with pytest.raises(UserError, match="unknown variant 'int3'"):
        load_dummy(str(config), "int3")
    with pytest.raises(UserError, match=r"is no config\.json"):
        load_dummy("nowhere", "fp16")
    with pytest.raises(UserError, match="runs on CUDA"):
        load_dummy(str(config), "awq-gemm", kernel="native")


def test_a_kernel_that_is_wrong_is_no_row(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = KERNELS["dequantize"]

    def swapped(weight: Int4Weight, *rest: object) -> Int4Linear:
        flipped = weight.codes.view(len(weight.codes), -1, 2).flip(-1).reshape(weight.codes.shape)
        return good.prepare(Int4Weight(flipped, weight.scales, weight.zeros), *rest)  # type: ignore[arg-type]

    faulty = type(good)(**{**good.__dict__, "prepare": swapped})
    monkeypatch.setitem(KERNELS, "dequantize", faulty)
    with pytest.raises(KernelFault, match="the kernel dequantize is wrong"):
        load_dummy(str(config), "awq-gemv", kernel="dequantize")


@pytest.mark.parametrize("variant", ["bnb-4bit", "bnb-8bit"])
def test_layers_with_biases_have_them(variant: str, config: Path) -> None:
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    config.write_text(json.dumps({**CONFIG, **qwen}))
    model = load_dummy(str(config), variant, device="cpu").model
    projection = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert torch.equal(projection.bias, torch.zeros(128))
    assert model.get_submodule("model.layers.1.self_attn.o_proj").bias is None
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(12).view(1, 12)).logits).all())


def test_every_embedding_in_half_precision_gives_rows_in_the_compute_dtype() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inside = (nn.Embedding(4, 8, dtype=torch.float16) for _ in range(2))
            self.head = nn.Linear(8, 4, bias=False, dtype=torch.float16)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    keep_half_embeddings(model, torch.float32)
    assert {one.weight.dtype for one in (model.tokens, model.inside)} == {torch.float16}
    rows = [one(torch.tensor([1])) for one in (model.tokens, model.inside)]
    assert {given.dtype for given in (*rows, model.head(rows[0]))} == {torch.float32}
