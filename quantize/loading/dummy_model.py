"""A variant of a model's shape with random weights, straight onto the device: no checkpoint, no download."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.dummy import SPREAD, DummyWeights, dummy_config, dummy_weights, generator_for, write_dummy_folder
from quantize.errors import UserError
from quantize.int4.weight import LEVELS, Int4Weight
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Placement, placement_for
from quantize.loading.footprint import weights_bytes
from quantize.loading.loading import PREFILL_TOKENS, Loaded, fill_rest, place_buffers, place_int4_layers, torch_device
from quantize.methods.bnb import BnbOptions, bnb_layers, bnb_linear, bnb_tensors
from quantize.model.architecture import architecture_of, group_size_for, quantized_shapes
from quantize.model.pretrained import empty_model
from quantize.quiet import quiet_libraries
from quantize.source import cache_folder
from quantize.variant import GROUP_SIZES, VARIANTS, Variant


@dataclass(frozen=True)
class _Asked:
    """One call of load_dummy."""

    variant: Variant
    place: Placement
    dtype: torch.dtype
    kernel: str | None
    group_size: int | None


def load_dummy(
    spec: str,
    variant: str,
    *,
    device: str = "cpu",
    compute_dtype: torch.dtype | None = None,
    kernel: str | None = None,
    group_size: int | None = None,
) -> Loaded:
    """A model ready to run whose memory and speed are those of a real checkpoint of this variant and shape.

    spec: a name of quantize.dummy.SHAPES or the path of a config.json. variant: a name of VARIANTS; the weights are
    drawn at random, 4-bit codes evenly from all 16, so that no search runs. device, compute_dtype, kernel: as
    quantize.load takes them; group_size: AWQ's, None for the largest that fits. Raises UserError for an unknown
    spec or variant, and what quantize.load raises.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; there are: {', '.join(VARIANTS)}")
    target = torch_device(device)
    dtype = compute_dtype or (torch.float32 if target.type == "cpu" else torch.float16)
    name, config = dummy_config(spec)
    with quiet_libraries(), torch.no_grad():
        folder = write_dummy_folder(config, name, cache_folder())
        model = empty_model(folder)
        weights = dummy_weights(model, target)
        method = VARIANTS[variant]
        place = placement_for(model, method, bnb_layers(model) if method.w_bit else (), target, dtype)
        asked = _Asked(method, place, dtype, kernel, group_size)
        prefill, decode = _FILLERS[asked.variant.method](model, weights, asked)
        place_buffers(model, place)
        size = place.weights_bytes or weights_bytes(model)
        place.dispatch(model)
        model.eval()
    return Loaded(model, None, target, dtype, prefill, decode, size, place.words)


def _fill_reference(model: Any, weights: DummyWeights, asked: _Asked) -> tuple[str, str]:
    _fill(model, weights, [], asked)
    name = f"torch ({dtype_name(asked.dtype)})"
    return name, name


def _fill_awq(model: Any, weights: DummyWeights, asked: _Asked) -> tuple[str, str]:
    shapes = quantized_shapes(architecture_of(model))
    group_size = group_size_for(shapes, asked.group_size, GROUP_SIZES)
    sizes = {name: (out_features, in_features) for name, out_features, in_features in shapes}
    known = set(weights.names())

    def read(name: str) -> tuple[Int4Weight, Tensor | None]:
        bias = weights.get(f"{name}.bias") if f"{name}.bias" in known else None
        return random_int4(name, *sizes[name], group_size, asked.place.main), bias

    chosen = place_int4_layers(
        model,
        list(sizes),
        read,
        version=str(asked.variant.version),
        kernel=asked.kernel,
        place=asked.place,
        dtype=asked.dtype,
    )
    fill_rest(model, weights, list(sizes), asked.place, asked.dtype)
    return chosen.describe(PREFILL_TOKENS, asked.dtype), chosen.describe(1, asked.dtype)


def random_int4(name: str, out_features: int, in_features: int, group_size: int, device: torch.device) -> Int4Weight:
    """A random weight as AWQ stores it; the same for the same name and device.

    Codes are even over 0 to 15 and zero points near the middle; the scales give the weights DummyWeights' spread.
    """
    generator = generator_for(f"{name} int4", device)

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)

    groups = in_features // group_size
    codes = drawn(0, LEVELS + 1, out_features, in_features)
    zeros = drawn(LEVELS // 2, LEVELS // 2 + 2, out_features, groups)
    uneven = torch.rand((out_features, groups), generator=generator, device=device).add_(0.5)
    deviation = ((LEVELS + 1) ** 2 / 12) ** 0.5  # of an even draw
    return Int4Weight(codes, (uneven * (SPREAD / deviation)).half(), zeros)


def _fill_bnb(model: Any, weights: DummyWeights, asked: _Asked) -> tuple[str, str]:
    names = bnb_layers(model)
    for name in names:
        model.set_submodule(name, _bnb_layer(name, model.get_submodule(name), weights, asked))
    _fill(model, weights, names, asked)
    bits = "int8" if asked.variant.w_bit == 8 else BnbOptions().quant_type
    described = f"bitsandbytes {bits} ({dtype_name(asked.dtype)})"
    return described, described


def _bnb_layer(name: str, linear: nn.Linear, weights: DummyWeights, asked: _Asked) -> nn.Module:
    """One of bitsandbytes' layers in place of this one, its random weight quantized on the device."""
    device = asked.place.of(name)
    bias = weights.get(f"{name}.bias").to(device, asked.dtype) if linear.bias is not None else None
    tensors = bnb_tensors(name, weights.get(f"{name}.weight").to(device), asked.variant, BnbOptions())
    return bnb_linear(name, tensors, (linear.out_features, linear.in_features), bias, device, asked.dtype)


def _fill(model: Any, weights: DummyWeights, done: list[str], asked: _Asked) -> None:
    """Draw every parameter that is not of a layer in `done`, in the compute dtype."""
    placed = tuple(f"{name}." for name in done)
    for name in weights.names():
        if not name.startswith(placed):
            parent, _, leaf = name.rpartition(".")
            value = weights.get(name).to(asked.place.of(name), asked.dtype)
            module = model.get_submodule(parent)
            if leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()


_FILLERS: dict[str, Callable[[Any, DummyWeights, _Asked], tuple[str, str]]] = {
    "FP16": _fill_reference,
    "AWQ": _fill_awq,
    "RTN": _fill_awq,
    "BnB.4": _fill_bnb,
    "BnB.8": _fill_bnb,
}
"""How each method's weights get into the empty model; gives what runs them in prefill and decode."""
