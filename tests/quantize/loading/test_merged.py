"""Layers that share an input run as one and give what they gave one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantize
from quantize.building.job import BuildOptions
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.kernels import KERNELS, NATIVE
from quantize.kernels.base import Int4Linear
from quantize.loader import load_dummy
from quantize.loading import int4_layers
from quantize.loading.device_map import Placement
from quantize.loading.int4_layers import Part, layers_by_input, replace_merged, stacked
from quantize.quiet import quiet_libraries
from tests.quantize.building.test_architectures import MODELS

CPU = torch.device("cpu")
HERE = Placement(CPU)


def random_layer(out_features: int, in_features: int = 64, biased: bool = True) -> tuple[Int4Weight, Tensor | None]:
    weight = round_to_nearest(torch.randn(out_features, in_features), 32)
    return weight, torch.randn(out_features) if biased else None


class CountedLinear(torch.nn.Module):
    """Stands around a prepared layer and counts its calls."""

    def __init__(self, inner: Int4Linear) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.in_features = inner.in_features

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(x)
        return out


@pytest.fixture
def merged() -> tuple[torch.nn.ModuleDict, CountedLinear, list[tuple[Int4Weight, Tensor | None]]]:
    torch.manual_seed(0)
    layers = [random_layer(32), random_layer(16, biased=False), random_layer(48)]
    whole, bias = stacked(layers)
    counted = CountedLinear(KERNELS["dequantize"].prepare(whole, bias, CPU, torch.float32))
    model = torch.nn.ModuleDict({name: torch.nn.Identity() for name in "qkv"})
    replace_merged(model, {"q": 32, "k": 16, "v": 48}, counted)
    return model, counted, layers


def exact(x: Tensor, layer: tuple[Int4Weight, Tensor | None]) -> Tensor:
    out = x @ layer[0].dequantize().t()
    return out if layer[1] is None else out + layer[1]


def test_each_part_is_its_layer_and_the_whole_runs_once(merged: Any) -> None:
    model, counted, layers = merged
    for _ in range(2):
        x = torch.randn(2, 3, 64)
        for name, layer in zip("qkv", layers, strict=True):
            torch.testing.assert_close(model[name](x), exact(x, layer))
    assert counted.calls == 2


def test_another_input_is_never_answered_with_the_last_ones(merged: Any) -> None:
    model, counted, layers = merged
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    model["q"](x)
    torch.testing.assert_close(model["k"](other), exact(other, layers[1]))
    torch.testing.assert_close(model["v"](x), exact(x, layers[2]))
    assert counted.calls == 3


def test_nothing_is_kept_after_the_last_part(merged: Any) -> None:
    model, _, _ = merged
    x = torch.randn(2, 64)
    for name in "qkv":
        model[name](x)
    assert model["q"].merged._last == [None, None, 0]


USUAL = ("llama", "mistral", "qwen", "phi3", "bloom", "mpt", "gemma2")


@pytest.mark.parametrize("name", sorted(name for name in MODELS if name.startswith(USUAL)))
def test_what_shares_an_input_in_each_architecture(name: str) -> None:
    with quiet_libraries():
        model = MODELS[name]()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names.remove("lm_head")
    together = layers_by_input(model, names, HERE)
    assert sorted(name for several in together for name in several) == sorted(names)
    shorter = {tuple(name.rpartition(".")[2] for name in several) for several in together}
    expected = {
        "phi3": {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)},
        "bloom": {("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)},
        "mpt": {("Wqkv",), ("out_proj",), ("up_proj",), ("down_proj",)},
    }
    apart = {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert shorter == expected.get(name.partition("-")[0], apart)


def test_layers_on_two_devices_stay_apart() -> None:
    with quiet_libraries():
        model = MODELS["llama-tied"]()
    layer = "model.layers.0.self_attn."
    place = Placement(CPU, {"": CPU, f"{layer}v_proj": torch.device("meta")})
    names = [f"{layer}{name}_proj" for name in "qkv"]
    assert layers_by_input(model, names, place) == [tuple(names[:2]), (names[2],)]


def layer_by_layer(model: object, names: list[str], place: Placement) -> list[tuple[str, ...]]:
    return [(name,) for name in names]


@pytest.mark.parametrize("name", ["qwen2-biases", "mistral-grouped-query"])
def test_a_checkpoint_gives_the_same_logits_as_layer_by_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    with quiet_libraries():
        MODELS[name]().config.save_pretrained(tmp_path / "model")
    source = f"dummy:{tmp_path / 'model' / 'config.json'}"
    options = BuildOptions(blocks=2, block_tokens=32, device="cpu", rounding="nearest", group_size=64)
    (built,) = quantize.quantize(source, ["awq-gemm"], tmp_path / "out", options=options)
    together = quantize.load(built.checkpoint.path, kernel="dequantize").model
    with monkeypatch.context() as patch:
        patch.setattr(int4_layers, "layers_by_input", layer_by_layer)
        apart = quantize.load(built.checkpoint.path, kernel="dequantize").model
    assert not any(isinstance(module, Part) for module in apart.modules())
    assert sum(isinstance(module, Part) for module in together.modules()) == 10
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(together(ids).logits, apart(ids).logits)
    # what the layout's name stood for ran them one by one
    monkeypatch.setitem(NATIVE, "GEMM", ("dequantize",))
    native = quantize.load(built.checkpoint.path, kernel="native").model
    assert not any(isinstance(module, Part) for module in native.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["dequantize", "triton"])
@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_on_a_gpu_too(tokens: int, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    with quiet_libraries():
        MODELS["qwen2-biases"]().config.save_pretrained(tmp_path)
    how: dict[str, Any] = {"device": "cuda", "kernel": kernel, "group_size": 64}
    together = load_dummy(str(tmp_path / "config.json"), "awq-gemm", **how).model
    monkeypatch.setattr(int4_layers, "layers_by_input", layer_by_layer)
    apart = load_dummy(str(tmp_path / "config.json"), "awq-gemm", **how).model
    assert sum(isinstance(module, Part) for module in together.modules()) == 10
    ids = torch.arange(3, 3 + tokens, device="cuda").view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(together(ids).logits, apart(ids).logits, rtol=2e-2, atol=2e-2)
