"""Other makers' checkpoints compute what their weights stand for, by formulas that share no code with the reader."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.building.build import quantize
from quantize.building.job import BuildOptions
from quantize.errors import UserError
from quantize.foreign import base_in_card, checkpoint_in, variant_of
from quantize.int4.layouts import LAYOUTS
from quantize.loader import load
from quantize.variant import known_variants
from tests import foreign
from tests.foreign import ct_config, write

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
OLD_AWQ = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any], Callable[..., foreign.Made], str | None]] = {
    "awq": ("awq-gemm", AWQ, partial(foreign.awq_gemm, group=64), None),
    "awq, quant_config.json": ("awq-gemm", OLD_AWQ, partial(foreign.awq_gemm, group=64), "quant_config.json"),
    "awq, one group a row": ("awq-gemm", {**AWQ, "group_size": -1}, partial(foreign.awq_gemm, group=128), None),
    "awq without zero points": ("awq-gemm", AWQ, partial(foreign.awq_symmetric, group=64), None),
    "auto-round as awq": (
        "awq-gemm", {**ROUND, "packing_format": "auto_round:auto_awq"}, partial(foreign.awq_gemm, group=64), None,
    ),
    "auto-round as gptq": (
        "gptq", {**ROUND, "packing_format": "auto_round:auto_gptq"}, partial(foreign.gptq, group=64), None,
    ),
    "gptq": ("gptq", {**GPTQ, "checkpoint_format": "gptq"}, partial(foreign.gptq, group=32), None),
    "gptq, version 2": (
        "gptq", {**GPTQ, "checkpoint_format": "gptq_v2"}, partial(foreign.gptq, group=32, stored_less=0), None,
    ),
    "gptq, version 2 by another key": (
        "gptq",
        {**GPTQ, "format": "gptq_v2"},
        partial(foreign.gptq, group=32, stored_less=0),
        None,
    ),
    "gptq, keys in larger groups than queries": (
        "gptq", GPTQ, lambda weight: foreign.gptq(weight, group=64 if len(weight) == 64 else 32), None,
    ),
    "gptq, act-order of keys alone": (
        "gptq", GPTQ, lambda weight: foreign.gptq(weight, group=32, act_order=len(weight) == 64), None,
    ),
    "gptq, act-order": ("gptq", GPTQ, partial(foreign.gptq, group=32, act_order=True), "quantize_config.json"),
    "compressed-tensors": ("ct", ct_config(64, symmetric=False), partial(foreign.compressed, group=64), None),
    "compressed-tensors, symmetric": (
        "ct", ct_config(32), partial(foreign.compressed, group=32, symmetric=True), None,
    ),
}  # fmt: skip


def logits_of(folder: Path, **how: Any) -> torch.Tensor:
    model = load(folder, **how).model
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(40).view(2, 20)).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_maker_computes_its_weights(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    variant, config, pack, beside = KINDS[kind]
    folder, dense = write(tiny_llama, tmp_path, config, pack, beside=beside)
    assert checkpoint_in(folder).manifest.variant == variant
    exact = logits_of(dense)
    torch.testing.assert_close(logits_of(folder, kernel="dequantize"), exact, rtol=1e-4, atol=1e-4)
    error = (logits_of(folder) - exact).norm() / exact.norm()  # the kernel for this machine
    assert error < 2e-2


def test_a_plain_folder_is_its_own_reference(tiny_llama: Path) -> None:
    assert checkpoint_in(tiny_llama).variant.name == "fp16"
    assert load(tiny_llama).kernel(1) == "torch (float32)"


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "foreign"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "awq-gemv"),
        ({"quant_method": "gptq", "bits": 8}, "foreign"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "foreign"),
        ({"quant_method": "fp8"}, "foreign"),
        ({**GPTQ, "dynamic": {"+:.*up_proj": {"bits": 8}}}, "foreign"),
        ({**GPTQ, "dynamic": {"-:.*up_proj": {}, "+:.*down_proj": {"group_size": 32}}}, "gptq"),
        ({**ROUND, "packing_format": "auto_round:auto_gptq", "extra_config": {"lm_head": {"bits": 8}}}, "foreign"),
        ({**ROUND, "packing_format": "auto_round:auto_gptq", "extra_config": {"lm_head": {"bits": 16}}}, "gptq"),
        ({**ct_config(64), "format": "int-quantized"}, "foreign"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-8bit"),
    ],
)
def test_what_a_config_states_decides_the_row(config: dict[str, Any], variant: str) -> None:
    assert variant_of(config) is known_variants()[variant]


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers dequantizes them only where there is no GPU")
def test_what_transformers_dequantizes_computes_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """8-bit floats on a CPU; what the file holds in half precision is brought to the same dtype."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64], "fmt": "e4m3"}
    folder, dense = write(tiny_llama, tmp_path, config, partial(foreign.fp8, block=64))
    torch.testing.assert_close(logits_of(folder), logits_of(dense), rtol=1e-4, atol=1e-4)
    assert load(folder).kernel(1) == "transformers fp8, dequantized (float32)"


def test_what_transformers_would_take_for_a_plain_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder, _ = write(tiny_llama, tmp_path, {"quant_method": "new"}, lambda weight: ({}, weight))
    shutil.copy(tiny_llama / "model.safetensors", folder)
    with pytest.raises(UserError, match="quantized by new, which transformers does not read"):
        load(folder)


def test_what_no_package_here_reads_names_the_package(tiny_llama: Path, tmp_path: Path) -> None:
    config = {"quant_method": "hqq", "bits": 8}
    folder, _ = write(tiny_llama, tmp_path, config, partial(foreign.gptq, group=32))
    with pytest.raises(UserError, match="quantized by hqq, which needs the package hqq"):
        load(folder)


SPOILED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a tensor gone": (lambda held: held.pop("model.layers.1.mlp.up_proj.qzeros"), "is not stored as GPTQ layers are"),
    "a layer gone": (
        lambda held: [held.pop(f"model.layers.1.mlp.up_proj.{part}") for part in ("qweight", "qzeros", "scales")],
        "no place for model.layers.1.mlp.up_proj.bias",
    ),
    "a stranger": (lambda held: held.update({"model.extra.weight": torch.ones(2)}), "no place for model.extra.weight"),
    "a bias that counts": (lambda held: held["model.layers.0.mlp.up_proj.bias"].fill_(1), "no place for .*bias"),
    "another shape": (
        lambda held: held.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(8, 256, dtype=torch.int32)}),
        "model.layers.0.mlp.up_proj is not stored",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_checkpoint_is_one_line(what: str, tiny_llama: Path, tmp_path: Path) -> None:
    spoil, words = SPOILED[what]
    folder, _ = write(tiny_llama, tmp_path, GPTQ, partial(foreign.gptq, group=32))
    held = load_file(folder / "model.safetensors")
    spoil(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: org/name\n---\n", "org/name"),
        ("---\nbase_model:\n- org/name\n---\n# Title\n", "org/name"),
        ("---\nbase_model: [a/b, c/d]\n---\n", None),
        ("no front matter", None),
        ("---\nbase_model: {a: b}\n---\n", None),
        ("---\n{{{\n---\n", None),
    ],
)
def test_the_card_may_name_the_base_model(card: str, base: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert base_in_card(tmp_path) == base


def test_no_config_makes_it_a_traceback(tiny_llama: Path, tmp_path: Path) -> None:
    folder, _ = write(tiny_llama, tmp_path, AWQ, partial(foreign.awq_gemm, group=64))
    for stated in ("text", ["awq"], {"quant_method": ["awq"]}, {"quant_method": "awq", "bits": "four"}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
        with pytest.raises(UserError):
            load(folder)


def test_three_layouts_of_ours_hold_the_same_integers(tiny_llama: Path, tmp_path: Path) -> None:
    layouts = {"awq-gemm": "GEMM", "awq-gemv": "GEMV", "awq-ct": "CT"}
    options = BuildOptions(blocks=2, block_tokens=32, device="cpu", rounding="nearest", group_size=64)
    built = {one.checkpoint.manifest.variant: one.checkpoint.path for one in
             quantize(str(tiny_llama), list(layouts), tmp_path, options=options)}  # fmt: skip
    files = {name: load_file(path / "model.safetensors") for name, path in built.items()}
    layers = [name.removesuffix(".qweight") for name in files["awq-gemm"] if name.endswith(".qweight")]
    assert len(layers) == 14
    for layer in layers:
        width = len(files["awq-gemm"][f"{layer}.qweight"])
        found = []
        for name, version in layouts.items():
            parts = {key.removeprefix(f"{layer}."): one for key, one in files[name].items() if key.startswith(layer)}
            found.append(LAYOUTS[version].unpack(parts, width, {"group_size": 64}).weight)
        for part in ("codes", "zeros", "scales"):
            assert all(torch.equal(getattr(one, part), getattr(found[0], part)) for one in found[1:])
    exact = logits_of(built["awq-gemm"], kernel="dequantize")
    assert torch.equal(logits_of(built["awq-ct"], kernel="dequantize"), exact)
    stated = json.loads((built["awq-ct"] / "config.json").read_text())["quantization_config"]
    assert variant_of(stated) is known_variants()["ct"]
