"""4-bit codes in groups, in AWQ's format: searched scales (AWQ), or plain rounding (RTN)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.dummy import DummyWeights, dummy_weights, random_int4
from quantize.errors import UserError
from quantize.int4.packing import PACKERS, UNPACKERS
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.kernels import Kernel
from quantize.loading.device_map import Running
from quantize.loading.int4_layers import place_int4_layers
from quantize.methods.base import Choices, Kernels, Method, Recipe, Tensors
from quantize.model.apart import take_apart
from quantize.model.layer_calls import runnable
from quantize.model.pretrained import config_of, empty_model
from quantize.model.scales import ScaledActivation
from quantize.model.skeleton import Skeleton
from quantize.rounding.options import AwqOptions
from quantize.variant import Variant
from quantize.weights import open_weights

PACKED = ("qweight", "qzeros", "scales")
"""What a checkpoint holds of a 4-bit layer."""

PREFILL_TOKENS = 1024
"""A long prompt, for naming the kernel that runs it."""


def _recipe(variant: Variant, choices: Choices) -> Recipe:
    searched = AwqOptions(choices.group_size or 0, rounding=choices.rounding)
    plain = AwqOptions(choices.group_size or 0, search=False, clip=False, refit=False)
    quantization = {
        "quant_method": "awq",
        "bits": variant.w_bit,
        "group_size": choices.group_size,
        "zero_point": True,
        "version": str(variant.version).lower(),
        "modules_to_not_convert": list(choices.kept) or None,
    }
    return Recipe(
        variant,
        torch.float16,
        quantization,
        choices.group_size,
        choices.calibration,
        plain if variant.method == RTN.name else searched,
    )


def _quantize_layer(name: str, weight: Tensor, recipe: Recipe) -> Tensors:
    return _pack({name: round_to_nearest(weight, recipe.settings.group_size)}, recipe)


def _pack(weights: Mapping[str, Int4Weight], recipe: Recipe) -> Tensors:
    pack = PACKERS[str(recipe.variant.version)]
    return {f"{name}.{part}": tensor for name, weight in weights.items() for part, tensor in pack(weight).items()}


def _load(folder: Path, how: Running) -> tuple[Any, Kernels]:
    config = config_of(folder)
    del config.quantization_config
    model = empty_model(folder, config=config, dtype=how.dtype)
    weights = open_weights(folder)
    packed = {name.removesuffix(".qweight") for name in weights.names() if name.endswith(".qweight")}
    group_size = how.group_size
    if group_size is None or not packed:
        raise UserError(f"{folder} holds no AWQ layers: make it again with `quantize --force`")
    beside = {f"{name}.{part}" for name in packed for part in PACKED}
    held = [name for name in weights.names() if name not in beside]
    skeleton = Skeleton.of(model, weights, [*held, *(f"{name}.weight" for name in packed)])
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    files = {name: skeleton.stored[f"{name}.weight"].removesuffix(".weight") for name in linears}
    quantized = [name for name, file_name in files.items() if file_name in packed]
    if lost := sorted(packed - {files[name] for name in quantized}):
        raise UserError(f"{lost[0]} is no linear layer of this architecture: make the checkpoint again")

    def read(name: str) -> Int4Weight:
        tensors = {part: weights.get(f"{files[name]}.{part}") for part in PACKED}
        return UNPACKERS[str(how.variant.version)](tensors, linears[name].in_features, group_size)

    for name in held:  # AWQ scales that no weight could absorb stand beside the activation function
        path, _, leaf = name.rpartition(".")
        if leaf == "scales" and name not in skeleton:
            scales = weights.get(name).to(how.place.of(path), how.dtype)
            model.set_submodule(path, ScaledActivation(model.get_submodule(path), scales))
    chosen = place_int4_layers(skeleton, quantized, read, how)
    how.place.dispatch(model)
    return model, _kernels(chosen, how.dtype)


def _draw(model: Any, weights: DummyWeights, how: Running) -> Kernels:
    take_apart(model)
    skeleton = Skeleton.of(model, dummy_weights(model, how.place.main))
    architecture = runnable(skeleton, how.place.main).with_group_size(how.group_size)
    sizes = {name: (rows, columns) for name, rows, columns in architecture.shapes()}

    def read(name: str) -> Int4Weight:
        return random_int4(name, *sizes[name], architecture.group_size or 0, how.place.main)

    return _kernels(place_int4_layers(skeleton, list(sizes), read, how), how.dtype)


def _kernels(chosen: Kernel, dtype: torch.dtype) -> Kernels:
    return chosen.describe(PREFILL_TOKENS, dtype), chosen.describe(1, dtype)


AWQ = Method("AWQ", _recipe, _load, _draw, needs_calibration=lambda rounding: True, pack=_pack, in_groups=True)
RTN = Method("RTN", _recipe, _load, _draw, quantize_layer=_quantize_layer, in_groups=True)
