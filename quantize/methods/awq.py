"""4-bit codes in groups, in AWQ's format: searched scales (AWQ), or plain rounding (RTN)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint import Checkpoint
from quantize.dummy import DummyWeights, random_int4
from quantize.errors import UserError
from quantize.int4.packing import PACKERS, UNPACKERS
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.kernels import Kernel
from quantize.loading.device_map import Placement
from quantize.loading.int4_layers import place_int4_layers
from quantize.methods.base import Choices, Drawing, Kernels, Method, Recipe, Tensors
from quantize.model.architecture import architecture_of, group_size_for, quantized_shapes
from quantize.model.pretrained import config_of, empty_model
from quantize.rounding.options import AwqOptions
from quantize.variant import Variant
from quantize.weights import open_weights

PREFILL_TOKENS = 1024
"""A long prompt, for naming the kernel that runs it."""


def _recipe_awq(variant: Variant, choices: Choices) -> Recipe:
    return _recipe(variant, choices, AwqOptions(choices.group_size or 0, rounding=choices.rounding))


def _recipe_rtn(variant: Variant, choices: Choices) -> Recipe:
    return _recipe(variant, choices, AwqOptions(choices.group_size or 0, search=False, clip=False, refit=False))


def _recipe(variant: Variant, choices: Choices, settings: AwqOptions) -> Recipe:
    quantization = {
        "quant_method": "awq",
        "bits": variant.w_bit,
        "group_size": choices.group_size,
        "zero_point": True,
        "version": str(variant.version).lower(),
        "modules_to_not_convert": choices.architecture.modules_to_not_convert if choices.architecture else None,
    }
    return Recipe(variant, torch.float16, quantization, choices.group_size, choices.calibration, settings)


def _quantize_layer(name: str, weight: Tensor, recipe: Recipe) -> Tensors:
    return _pack({name: round_to_nearest(weight, recipe.settings.group_size)}, recipe)


def _pack(weights: Mapping[str, Int4Weight], recipe: Recipe) -> Tensors:
    pack = PACKERS[str(recipe.variant.version)]
    return {f"{name}.{part}": tensor for name, weight in weights.items() for part, tensor in pack(weight).items()}


def _load(checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None) -> tuple[Any, Kernels]:
    config = config_of(checkpoint.path)
    del config.quantization_config
    model = empty_model(checkpoint.path, config=config, dtype=dtype)
    weights = open_weights(checkpoint.path)
    quantized = sorted(name.removesuffix(".qweight") for name in weights.names() if name.endswith(".qweight"))
    group_size = checkpoint.manifest.q_group_size
    if group_size is None or not quantized:
        raise UserError(f"{checkpoint.path} holds no AWQ layers: make it again with `quantize --force`")
    version = str(checkpoint.variant.version)

    def read(name: str) -> Int4Weight:
        tensors = {part: weights.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
        return UNPACKERS[version](tensors, model.get_submodule(name).in_features, group_size)

    chosen = place_int4_layers(
        model, quantized, read, weights, version=version, kernel=kernel, place=place, dtype=dtype
    )
    place.dispatch(model)
    return model, _kernels(chosen, dtype)


def _draw(model: Any, weights: DummyWeights, drawing: Drawing) -> Kernels:
    shapes = quantized_shapes(architecture_of(model))
    group_size = group_size_for(shapes, drawing.group_size)
    sizes = {name: (rows, columns) for name, rows, columns in shapes}

    def read(name: str) -> Int4Weight:
        return random_int4(name, *sizes[name], group_size, drawing.place.main)

    version, kernel, place, dtype = str(drawing.variant.version), drawing.kernel, drawing.place, drawing.dtype
    chosen = place_int4_layers(
        model, list(sizes), read, weights, version=version, kernel=kernel, place=place, dtype=dtype
    )
    return _kernels(chosen, dtype)


def _kernels(chosen: Kernel, dtype: torch.dtype) -> Kernels:
    return chosen.describe(PREFILL_TOKENS, dtype), chosen.describe(1, dtype)


AWQ = Method("AWQ", _recipe_awq, _load, _draw, needs_calibration=lambda rounding: True, pack=_pack, in_groups=True)
RTN = Method("RTN", _recipe_rtn, _load, _draw, quantize_layer=_quantize_layer, in_groups=True)
