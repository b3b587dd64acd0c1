"""4-bit codes in groups, in AWQ's format: searched scales (AWQ), or plain rounding (RTN)."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.dummy import DummyWeights, dummy_weights, random_int4
from quantize.errors import UserError
from quantize.gguf_file import open_gguf
from quantize.int4.layouts import LAYOUTS, StoredLayer
from quantize.int4.packing import PACKERS
from quantize.int4.weight import Int4Weight, round_to_nearest
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
from quantize.weights import open_weights, quantization_config


def _recipe(variant: Variant, choices: Choices) -> Recipe:
    size = choices.group_size
    settings = AwqOptions(size or 0, rounding=choices.rounding)
    if variant.method == RTN.name:
        settings = AwqOptions(size or 0, search=False, clip=False, refit=False)
    awq: dict[str, Any] = {"quant_method": "awq", "bits": variant.w_bit, "group_size": size, "zero_point": True}
    awq |= {"version": str(variant.version).lower(), "modules_to_not_convert": list(choices.kept) or None}
    gguf = {"quant_method": "gguf", "bits": variant.w_bit, "group_size": size}
    quantization = {"CT": packed_config(choices), "GGUF": gguf}.get(str(variant.version), awq)
    return Recipe(variant, torch.float16, quantization, size, choices.calibration, settings)


def packed_config(choices: Choices) -> dict[str, Any]:
    """What config.json says of compressed-tensors' packed codes."""
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "dynamic": False}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": choices.group_size}}
    kept = {"ignore": list(dict.fromkeys((*choices.kept, "lm_head"))), "config_groups": {"group_0": group}}
    stored = {"format": "pack-quantized", "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", **stored, **kept}


def _quantize_layer(name: str, weight: Tensor, recipe: Recipe) -> Tensors:
    return _pack({name: round_to_nearest(weight, recipe.settings.group_size)}, recipe)


def _pack(weights: Mapping[str, Int4Weight], recipe: Recipe) -> Tensors:
    pack = PACKERS[str(recipe.variant.version)]
    return {f"{name}.{part}": tensor for name, weight in weights.items() for part, tensor in pack(weight).items()}


def _load(folder: Path, how: Running) -> tuple[Any, Kernels]:
    config, stated = config_of(folder), quantization_config(folder) or {}
    vars(config).pop("quantization_config", None)
    model = empty_model(folder, config=config, dtype=how.dtype)
    weights = open_gguf(folder) if how.variant.is_gguf else open_weights(folder)
    layout = LAYOUTS[str(how.variant.version)]
    marker = f".{layout.parts[0]}"
    packed = {name.removesuffix(marker) for name in weights.names() if name.endswith(marker)}
    if not packed:
        raise UserError(f"{folder} holds no 4-bit layers of the layout {how.variant.version}: get it again")
    stored = {f"{name}.{part}" for name in packed for part in layout.parts} & set(weights.names())
    held = [name for name in weights.names() if name not in stored]
    skeleton = Skeleton.of(model, weights, [*held, *(f"{name}.weight" for name in packed)])
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    files = {name: skeleton.stored[f"{name}.weight"].removesuffix(".weight") for name in linears}
    quantized = [name for name, file_name in files.items() if file_name in packed]
    if lost := sorted(packed - {files[name] for name in quantized}):
        raise UserError(f"{lost[0]} is no linear layer of this architecture: get the checkpoint again")
    refuse_strangers(folder, skeleton, held, packed)

    def read(name: str) -> StoredLayer:
        tensors = {part: weights.get(at) for part in layout.parts if (at := f"{files[name]}.{part}") in stored}
        asked = list(linears[name].weight.shape)
        try:
            found = layout.unpack(tensors, asked[1], stated)
        except (KeyError, ValueError, RuntimeError, UserError) as error:
            raise UserError(f"{files[name]} is not stored as {how.variant.version} layers are: {error}") from None
        if (given := list(found.weight.codes.shape)) != asked:
            raise UserError(f"{files[name]} is of shape {given} where config.json asks for {asked}")
        return found

    for name in held:  # AWQ scales that no weight could absorb stand beside the activation function
        path, _, leaf = name.rpartition(".")
        if leaf == "scales" and name not in skeleton:
            scales = weights.get(name).to(how.place.of(path), how.dtype)
            model.set_submodule(path, ScaledActivation(model.get_submodule(path), scales))
    chosen = place_int4_layers(skeleton, quantized, read, how)
    how.place.dispatch(model)
    return model, partial(chosen.describe, dtype=how.dtype)


def refuse_strangers(folder: Path, skeleton: Skeleton, held: Sequence[str], packed: Collection[str]) -> None:
    """Raise UserError for a tensor that the model has no place for.

    AutoGPTQ writes biases of zeros for layers that have none, older models their rotary frequencies; scales beside an
    activation function are AWQ's."""
    for name in held:
        path, _, leaf = name.rpartition(".")
        known = skeleton.files.homes[name] in skeleton.files.known or leaf in ("scales", "inv_freq")
        if not known and not (leaf == "bias" and path in packed and not skeleton.weights.get(name).any()):
            raise UserError(f"{folder}: the model of config.json has no place for {name}: get the checkpoint again")


def _draw(model: Any, weights: DummyWeights, how: Running) -> Kernels:
    take_apart(model)
    skeleton = Skeleton.of(model, dummy_weights(model, how.place.main))
    architecture = runnable(skeleton, how.place.main).with_group_size(how.group_size)
    shapes = {shape[0]: shape for shape in architecture.shapes()}

    def read(name: str) -> StoredLayer:
        return StoredLayer(random_int4(*shapes[name], architecture.group_size or 0, how.place.main))

    return partial(place_int4_layers(skeleton, list(shapes), read, how).describe, dtype=how.dtype)


AWQ = Method("AWQ", _recipe, _load, _draw, needs_calibration=lambda rounding: True, pack=_pack, in_groups=True)
RTN = Method("RTN", _recipe, _load, _draw, quantize_layer=_quantize_layer, in_groups=True)
GPTQ, CT = (Method(name, _recipe, _load, _draw, in_groups=True) for name in ("GPTQ", "CT"))
"""Of other makers, read alone."""
