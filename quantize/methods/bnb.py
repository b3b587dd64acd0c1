"""bitsandbytes: 4-bit (nf4, fp4) and 8-bit (LLM.int8)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint import Checkpoint
from quantize.dummy import DummyWeights
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Placement
from quantize.loading.dummy_model import fill
from quantize.methods.base import Choices, Drawing, Kernels, LayerInputs, Method, Recipe, Tensors
from quantize.methods.bnb_weights import bnb_4bit_with_feedback, bnb_linear, bnb_quantization_config, bnb_tensors
from quantize.model.names import linear_layers
from quantize.model.pretrained import config_of, model_of
from quantize.model.tensors import half
from quantize.rounding.options import BnbOptions
from quantize.variant import Variant


def _recipe_4bit(variant: Variant, choices: Choices) -> Recipe:
    settings = replace(choices.bnb, rounding=choices.rounding)
    quantization = bnb_quantization_config(variant, settings)
    return Recipe(variant, choices.half_dtype, quantization, None, choices.calibration, settings)


def _recipe_8bit(variant: Variant, choices: Choices) -> Recipe:
    return Recipe(variant, choices.half_dtype, bnb_quantization_config(variant, choices.bnb))


def _quantize_layer(name: str, weight: Tensor, recipe: Recipe) -> Tensors:
    return bnb_tensors(name, weight, recipe.variant, recipe.settings or BnbOptions())


def _from_inputs(seen: LayerInputs, recipe: Recipe) -> Tensors:
    """The bnb-4bit tensors of one decoder layer, rounded with error feedback."""
    tensors = {name: half(name, tensor, recipe.dtype) for name, tensor in seen.others().items()}
    for owner, stats in seen.stats.items():
        weights = {seen.prefix + name: seen.linears[name].weight.data.to(recipe.dtype) for name in seen.sharing(owner)}
        tensors |= bnb_4bit_with_feedback(weights, stats.shrunk(), recipe.settings)
    return tensors


def _load(checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None) -> tuple[Any, Kernels]:
    model = model_of(checkpoint.path, dtype=dtype, device_map=place.as_map())
    _set_compute_dtype(model, dtype)
    quantization = config_of(checkpoint.path).quantization_config
    return model, _kernels(checkpoint.variant, quantization["bnb_4bit_quant_type"], dtype)


def _set_compute_dtype(model: Any, dtype: torch.dtype) -> None:
    """Compute in `dtype`: transformers leaves a quantized checkpoint's other tensors in the dtype of the file."""
    from bitsandbytes.nn import Linear4bit

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    model.tie_weights()


def _draw(model: Any, weights: DummyWeights, drawing: Drawing) -> Kernels:
    names = linear_layers(model)
    for name in names:
        model.set_submodule(name, _drawn_layer(name, model.get_submodule(name), weights, drawing))
    fill(model, weights, names, drawing.place, drawing.dtype)
    return _kernels(drawing.variant, BnbOptions().quant_type, drawing.dtype)


def _drawn_layer(name: str, linear: nn.Linear, weights: DummyWeights, drawing: Drawing) -> nn.Module:
    """One of bitsandbytes' layers in place of this one, its random weight quantized on the device."""
    device, dtype = drawing.place.of(name), drawing.dtype
    bias = weights.get(f"{name}.bias").to(device, dtype) if linear.bias is not None else None
    tensors = bnb_tensors(name, weights.get(f"{name}.weight").to(device), drawing.variant, BnbOptions())
    return bnb_linear(name, tensors, (linear.out_features, linear.in_features), bias, device, dtype)


def _kernels(variant: Variant, quant_type: str, dtype: torch.dtype) -> Kernels:
    name = f"bitsandbytes {'int8' if variant.w_bit == 8 else quant_type} ({dtype_name(dtype)})"
    return name, name


BNB_4BIT = Method(
    "BnB.4",
    _recipe_4bit,
    _load,
    _draw,
    quantize_layer=_quantize_layer,
    needs_calibration=lambda rounding: rounding == "gptq",
    from_inputs=_from_inputs,
)
BNB_8BIT = Method("BnB.8", _recipe_8bit, _load, _draw, quantize_layer=_quantize_layer)
