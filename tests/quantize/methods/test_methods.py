"""Rows of METHODS and of VARIANTS fit each other, and what a manifest states is what ran."""

from dataclasses import replace
from pathlib import Path

import pytest

import quantize
from quantize.building.job import BuildOptions
from quantize.errors import UserError
from quantize.methods import METHODS
from quantize.methods.base import Choices, Recipe
from quantize.variant import VARIANTS, Variant, known_variants

UNCLIPPED = Variant("awq-unclipped", "AWQ-unclipped", w_bit=4, version="GEMM", published=False)


def recipe(variant: Variant, choices: Choices) -> Recipe:
    made = METHODS["AWQ"].recipe(variant, choices)
    return replace(made, settings=replace(made.settings, clip=False))


def test_every_variant_has_a_method_and_every_method_a_variant() -> None:
    assert {variant.method for variant in known_variants().values()} == METHODS.keys()
    assert all(METHODS[variant.method].in_groups == variant.is_awq for variant in known_variants().values())


def test_the_classes_of_the_package_have_one_home() -> None:
    assert quantize.Loaded is quantize.LoadedModel
    assert all(getattr(quantize, name) for name in quantize.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'unquantize'"):
        _ = quantize.unquantize


def test_searches_with_other_options_never_share_a_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, UNCLIPPED.name, UNCLIPPED)
    monkeypatch.setitem(METHODS, UNCLIPPED.method, replace(METHODS["AWQ"], name=UNCLIPPED.method, recipe=recipe))
    options = BuildOptions(blocks=2, block_tokens=32, device="cpu")
    with pytest.raises(UserError, match="awq-gemm and awq-unclipped search with different options: make them in sep"):
        quantize.quantize(str(tiny_llama), ["awq-gemm", UNCLIPPED.name], tmp_path, options=options)
    assert not list(tmp_path.iterdir())
    made = [
        quantize.quantize(str(tiny_llama), [name], tmp_path, options=options)[0]
        for name in ("awq-gemm", UNCLIPPED.name)
    ]
    clipped, unclipped = (one.checkpoint.manifest for one in made)
    assert unclipped.options == {**clipped.options, "clip": False}
    assert unclipped.files["model.safetensors"] != clipped.files["model.safetensors"]
    kept = quantize.quantize(str(tiny_llama), ["awq-gemm", UNCLIPPED.name], tmp_path, options=options)
    assert all(one.kept for one in kept)
