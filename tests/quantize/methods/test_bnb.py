"""The tensors that we write are those that bitsandbytes makes, and plain transformers reads them back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantize.errors import UserError
from quantize.methods.bnb import bnb_4bit_with_feedback, bnb_linear, bnb_quantization_config, bnb_tensors
from quantize.model.names import linear_layers
from quantize.quiet import quiet_libraries
from quantize.rounding.gram import InputStats
from quantize.rounding.options import BnbOptions
from quantize.variant import VARIANTS, Variant
from quantize.weights import open_weights

FOUR, EIGHT = VARIANTS["bnb-4bit"], VARIANTS["bnb-8bit"]
CASES = {
    "nf4": (FOUR, BnbOptions()),
    "fp4": (FOUR, BnbOptions(quant_type="fp4")),
    "nf4-double": (FOUR, BnbOptions(double_quant=True)),
    "nf4-128": (FOUR, BnbOptions(blocksize=128)),
    "int8": (EIGHT, BnbOptions()),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantized_copy(source: Path, folder: Path, variant: Variant, options: BnbOptions) -> Path:
    """A checkpoint made from our tensors and our config entry, and nothing else of ours."""
    weights = open_weights(source)
    layers = linear_layers(load(source))
    tensors: dict[str, torch.Tensor] = {}
    for name in weights.names():
        layer = name.removesuffix(".weight")
        if layer in layers:
            tensors |= bnb_tensors(layer, weights.get(name), variant, options)
        else:
            tensors[name] = weights.get(name)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = bnb_quantization_config(variant, options)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantized(module: Any) -> torch.Tensor:
    """The weight that bitsandbytes itself says a layer holds."""
    from bitsandbytes import functional

    weight = module.weight
    if hasattr(weight, "quant_state"):
        dense = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        dense = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return torch.as_tensor(dense, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_reads_our_checkpoint_with_the_weights_that_bitsandbytes_makes(
    case: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from bitsandbytes import functional

    variant, options = CASES[case]
    ours = load(quantized_copy(tiny_llama, tmp_path / "ours", variant, options))
    original = load(tiny_llama)
    for name in linear_layers(original):
        weight = original.get_submodule(name).weight.data
        if variant is EIGHT:
            codes, scales, _ = functional.int8_vectorwise_quant(weight)
            expected = functional.int8_vectorwise_dequant(codes, scales)
        else:
            codes, state = functional.quantize_4bit(
                weight,
                blocksize=options.blocksize,
                compress_statistics=options.double_quant,
                quant_type=options.quant_type,
            )
            expected = functional.dequantize_4bit(codes, state)
        assert torch.equal(dequantized(ours.get_submodule(name)), expected.float()), name
        worst = (expected.float() - weight.float()).abs().max() / weight.float().abs().max()
        assert worst < (0.01 if variant is EIGHT else 0.25), "it is still the same weight"


@pytest.mark.parametrize("case", ["nf4", "fp4", "nf4-double", "int8"])
def test_our_tensors_are_bit_for_bit_those_of_transformers_own_quantization(
    case: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    variant, options = CASES[case]
    settings = bnb_quantization_config(variant, options)
    settings.pop("quant_method")
    theirs = load(tiny_llama, quantization_config=BitsAndBytesConfig(**settings)).state_dict()
    theirs.pop("lm_head.weight")  # tied
    folder = quantized_copy(tiny_llama, tmp_path / "ours", variant, options)
    ours = open_weights(folder)
    assert sorted(ours.names()) == sorted(theirs)
    for name, tensor in theirs.items():
        mine = ours.get(name)
        assert mine.dtype == tensor.dtype, name
        assert torch.equal(mine, tensor.cpu()), name


@pytest.mark.parametrize("case", ["nf4", "int8"])
def test_our_checkpoint_runs_and_its_output_is_close_to_the_original(
    case: str, tiny_llama: Path, tmp_path: Path
) -> None:
    ids = torch.arange(1, 65).reshape(2, 32)
    ours = load(quantized_copy(tiny_llama, tmp_path / "ours", *CASES[case]), dtype=torch.float32)
    original = load(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        difference = (ours(ids).logits - original(ids).logits).norm() / original(ids).logits.norm()
    assert 0 < difference < (0.05 if case == "int8" else 0.35)


def test_every_linear_layer_of_the_decoder_is_quantized_and_the_head_is_not(tiny_llama: Path) -> None:
    layers = linear_layers(load(tiny_llama))
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sorted(layers) == sorted(f"model.layers.{n}.{part}" for n in (0, 1) for part in attention + mlp)


def test_an_untied_head_is_not_quantized_either(tiny_llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert "lm_head" not in linear_layers(model)
    assert len(linear_layers(model)) == 14


def test_what_we_call_quantized_is_what_transformers_replaces(tiny_llama: Path, tmp_path: Path) -> None:
    import bitsandbytes

    ours = load(quantized_copy(tiny_llama, tmp_path / "ours", FOUR, BnbOptions()))
    replaced = {name for name, m in ours.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert replaced == set(linear_layers(load(tiny_llama)))


def test_a_model_without_linear_layers_is_refused_in_one_line() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128))
    with pytest.raises(UserError, match=r"nn\.Linear layers, which GPT2LMHeadModel does not have"):
        linear_layers(model)


def test_double_quantization_stores_less(tiny_llama: Path) -> None:
    weight = open_weights(tiny_llama).get("model.layers.0.mlp.up_proj.weight")
    plain = bnb_tensors("up", weight, FOUR, BnbOptions())
    double = bnb_tensors("up", weight, FOUR, BnbOptions(double_quant=True))
    assert plain["up.weight.absmax"].nbytes == 4 * weight.numel() / 64
    assert double["up.weight.absmax"].nbytes == weight.numel() / 64


def test_a_row_of_int8_is_its_scale_times_its_codes() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float16)
    tensors = bnb_tensors("layer", weight, EIGHT, BnbOptions())
    assert sorted(tensors) == ["layer.SCB", "layer.weight", "layer.weight_format"]
    assert tensors["layer.SCB"].tolist() == [2.0, 0.0]
    assert tensors["layer.weight"][0].tolist() == [64, -127, 32]
    assert tensors["layer.weight_format"].item() == 0


@pytest.mark.parametrize("variant", [FOUR, EIGHT])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(variant: Variant, bad: float) -> None:
    weight = torch.ones(64, 64, dtype=torch.float16)
    weight[3, 5] = bad
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds (NaN|Inf)"):
        bnb_tensors("model.layers.0.mlp.up_proj", weight, variant, BnbOptions())


def test_a_weight_too_large_for_float16_is_refused_only_where_float16_is_needed() -> None:
    weight = torch.full((64, 64), 1e5, dtype=torch.float32)
    with pytest.raises(UserError, match="more than float16 can"):
        bnb_tensors("layer", weight, EIGHT, BnbOptions())
    assert "layer.weight" in bnb_tensors("layer", weight, FOUR, BnbOptions())


def test_bad_options_are_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="choose one of nf4, fp4"):
        BnbOptions(quant_type="int4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="choose one of 32, 64"):
        BnbOptions(blocksize=48)


@pytest.mark.parametrize("options", [BnbOptions(), BnbOptions("fp4"), BnbOptions(double_quant=True)])
def test_feedback_lowers_the_error_on_the_inputs_it_was_given(options: BnbOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    loud = torch.exp(torch.randn(128, generator=generator))
    mixing = torch.randn((128, 128), generator=generator)
    inputs = torch.randn((900, 128), generator=generator) @ mixing * loud
    weights = {
        "a": (torch.randn((64, 128), generator=generator) * 0.1).half(),
        "b": (torch.randn((32, 128), generator=generator) * 0.02).half(),
    }
    gram = inputs.t() @ inputs / 900
    fed_back, values = bnb_4bit_with_feedback(weights, InputStats(gram, gram.diagonal()), options)
    variant = VARIANTS["bnb-4bit"]
    nearest = {k: t for name, w in weights.items() for k, t in bnb_tensors(name, w, variant, options).items()}
    assert fed_back.keys() == nearest.keys()

    def error(tensors: dict[str, torch.Tensor], name: str) -> float:
        from bitsandbytes import functional

        own = {
            key.removeprefix(f"{name}.weight."): t for key, t in tensors.items() if key.startswith(f"{name}.weight.")
        }
        state = functional.QuantState.from_dict(own, device=torch.device("cpu"))
        back = functional.dequantize_4bit(tensors[f"{name}.weight"], state).float()
        assert tensors is nearest or torch.allclose(values[name], back, rtol=1e-3, atol=1e-6)
        return float((inputs @ (back - weights[name].float()).t()).norm())

    for name in weights:
        assert error(fed_back, name) < 0.9 * error(nearest, name)
        scales = [key for key in fed_back if key.startswith(f"{name}.weight.")]
        assert all(torch.equal(fed_back[key], nearest[key]) for key in scales)


def test_feedback_without_correlation_is_bitsandbytes_own_rounding() -> None:
    weights = {"a": torch.randn((16, 64), generator=torch.Generator().manual_seed(0))}
    fed_back, _ = bnb_4bit_with_feedback(weights, InputStats(torch.eye(64), torch.ones(64)), BnbOptions())
    nearest = bnb_tensors("a", weights["a"], VARIANTS["bnb-4bit"], BnbOptions())
    assert torch.equal(fed_back["a.weight"], nearest["a.weight"])


def test_rows_of_no_whole_number_of_blocks_are_rounded_to_nearest() -> None:
    weights = {"a": torch.randn((32, 96), generator=torch.Generator().manual_seed(0))}
    gram = torch.ones(96, 96) + torch.eye(96)
    fed_back, _ = bnb_4bit_with_feedback(weights, InputStats(gram, gram.diagonal()), BnbOptions())
    nearest = bnb_tensors("a", weights["a"], VARIANTS["bnb-4bit"], BnbOptions())
    assert fed_back.keys() == nearest.keys()
    assert all(torch.equal(fed_back[name], nearest[name]) for name in nearest)


@pytest.mark.parametrize("shape", [(40, 128), (64, 96), (64, 128)])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_of_any_shape_multiplies(shape: tuple[int, int], double: bool) -> None:
    """Where a CPU has AVX-512, bitsandbytes packs rows by 32, of whole blocks, and fails on others."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn((3, shape[1]), generator=generator)
    tensors = bnb_tensors("a", weight, FOUR, BnbOptions(double_quant=double))
    layer = bnb_linear("a", tensors, shape, torch.device("cpu"), torch.float32).eval()
    exact = x @ dequantized(layer).t()
    with torch.no_grad():
        assert (layer(x) - exact).norm() / exact.norm() < 1e-2
