"""A model too big for one GPU. The free memory is made up; without a GPU all that accelerate moves stays on the CPU."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import quantize
from quantize import loader
from quantize.building.job import BuildOptions
from quantize.loader import LoadedModel, load_dummy
from quantize.loading.device_map import Placement, placement_for
from quantize.model.pretrained import empty_model
from quantize.variant import VARIANTS, Variant

LAYERS, WIDTH, INNER, WORDS = 4, 64, 128, 96
LAYER = 2 * WIDTH * WIDTH + 2 * 32 * WIDTH + 3 * WIDTH * INNER
ROTARY = 2 * 8
ALL_BYTES = 2 * (LAYERS * (LAYER + 2 * WIDTH) + WIDTH + 2 * WORDS * WIDTH + ROTARY)
CUDA = torch.device("cuda")


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shape"
    folder.mkdir()
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def placed(shape: Path, variant: str, free: dict[int | str, int]) -> Placement:
    return placement_for(empty_model(shape.parent), VARIANTS[variant], CUDA, torch.float16, free=free)


def test_a_model_that_fits_is_not_spread(shape: Path) -> None:
    assert placed(shape, "fp16", {0: int(ALL_BYTES / 0.94), "cpu": 10**9}) == Placement(CUDA)
    assert placed(shape, "fp16", {0: int(ALL_BYTES / 0.96), "cpu": 10**9}).weights_bytes == ALL_BYTES
    assert placed(shape, "awq-gemm", {0: ALL_BYTES // 2, "cpu": 0}) == Placement(CUDA)


def test_a_tied_embedding_counts_once(shape: Path) -> None:
    shape.write_text(json.dumps({**json.loads(shape.read_text()), "tie_word_embeddings": True}))
    spread = placed(shape, "fp16", {0: ALL_BYTES // 2, "cpu": 10**9})
    assert spread.weights_bytes == ALL_BYTES - 2 * WORDS * WIDTH


def test_the_reference_fills_the_gpus_and_waits_in_ram_for_the_rest(shape: Path) -> None:
    spread = placed(shape, "fp16", {0: int(0.7 * ALL_BYTES), 1: ALL_BYTES // 3, "cpu": 10**9})
    assert spread.of("model.embed_tokens") == torch.device("cuda:0")
    assert spread.of("model.layers.3.mlp.up_proj") == torch.device("cpu")
    assert spread.description == "decoder layers: 1 on cuda:0, 1 on cuda:1, 2 in RAM"


def test_quantized_layers_are_spread_over_gpus_alone(shape: Path) -> None:
    spread = placed(shape, "bnb-8bit", {0: ALL_BYTES // 2, 1: ALL_BYTES // 2, "cpu": 0})
    assert {place.type for place in spread.device_map.values()} == {"cuda"}
    with pytest.raises(MemoryError, match=r"GB of weights do not fit .*: cuda:0 0\.0 GB$"):
        placed(shape, "bnb-8bit", {0: ALL_BYTES // 3, "cpu": 10**9})


@pytest.mark.parametrize(("bits", "stored_bits"), [(3, 4), (4, 4), (6, 8), (8, 8), (12, 16)])
def test_a_variant_of_other_bits_counts_as_the_next_larger(shape: Path, bits: int, stored_bits: int) -> None:
    model, variant = empty_model(shape.parent), Variant("odd", "Odd", w_bit=bits)
    free: dict[int | str, int] = {0: ALL_BYTES // 10, 1: 2 * ALL_BYTES, "cpu": 0}
    spread = placement_for(model, variant, CUDA, torch.float16, free=free)
    assert spread.weights_bytes == ALL_BYTES - LAYERS * LAYER * (16 - stored_bits) // 8


def spread_over(device: torch.device) -> Placement:
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{index}" for index in range(LAYERS)]
    return Placement(device, dict.fromkeys([*names, *layers], device), 12345, "as told")


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(input_ids=torch.arange(12, device=loaded.device).view(2, 6)).logits
    return logits.cpu()


def has_hooks(loaded: LoadedModel) -> bool:
    return all(hasattr(layer, "_hf_hook") for layer in loaded.model.model.layers)


@pytest.mark.parametrize("variant", ["awq-gemm", "awq-gemv"])
def test_a_spread_checkpoint_gives_the_same_logits(
    variant: str, shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(blocks=2, block_tokens=32, device="cpu", rounding="nearest")
    (built,) = quantize.quantize(f"dummy:{shape}", [variant], tmp_path / "out", options=options)
    whole = loader.load(built.checkpoint.path, kernel="dequantize")
    monkeypatch.setattr(loader, "Placement", spread_over)
    loaded = loader.load(built.checkpoint.path, kernel="dequantize")
    assert (loaded.placement, loaded.weights_bytes) == ("as told", 12345)
    assert (has_hooks(whole), has_hooks(loaded)) == (False, True)
    assert torch.equal(logits_of(loaded), logits_of(whole))


@pytest.mark.parametrize("variant", ["fp16", "awq-gemm", "bnb-8bit"])
def test_so_do_spread_random_weights(variant: str, shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "dequantize" if "awq" in variant else None
    whole = load_dummy(str(shape), variant, kernel=kernel)
    monkeypatch.setattr("quantize.loader.placement_for", lambda *_: spread_over(torch.device("cpu")))
    spread = load_dummy(str(shape), variant, kernel=kernel)
    assert (spread.placement, has_hooks(spread)) == ("as told", True)
    assert torch.equal(logits_of(spread), logits_of(whole))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_layers_that_wait_in_ram_run_on_the_gpu(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_dummy(str(shape), "fp16", device="cuda")
    free: dict[int | str, int] = {0: int(0.7 * ALL_BYTES), "cpu": 10**9}
    monkeypatch.setattr("quantize.loader.placement_for", partial(placement_for, free=free))
    spread = load_dummy(str(shape), "fp16", device="cuda")
    assert "in RAM" in str(spread.placement)
    # accelerate counts the rotary frequencies, which are float32, in the compute dtype
    assert spread.weights_bytes == pytest.approx(whole.weights_bytes, rel=1e-3)
    # in float16, added up in another order
    torch.testing.assert_close(logits_of(spread), logits_of(whole), atol=1e-3, rtol=1e-2)
