"""Random weights straight onto the device: no checkpoint, no download."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.dummy import WEIGHT_STD, DummyWeights, generator_for
from quantize.int4.weight import LEVELS, Int4Weight
from quantize.loading.device_map import Placement


def random_int4(name: str, out_features: int, in_features: int, group_size: int, device: torch.device) -> Int4Weight:
    """A random weight as AWQ stores it; the same for the same name and device.

    Codes are even over 0 to 15 and zero points near the middle; the scales give the weights DummyWeights' deviation.
    """
    generator = generator_for(f"{name} int4", device)

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)

    groups = in_features // group_size
    codes = drawn(0, LEVELS + 1, out_features, in_features)
    zeros = drawn(LEVELS // 2, LEVELS // 2 + 2, out_features, groups)
    uneven = torch.rand((out_features, groups), generator=generator, device=device).add_(0.5)
    deviation = ((LEVELS + 1) ** 2 / 12) ** 0.5  # of an even draw
    return Int4Weight(codes, (uneven * (WEIGHT_STD / deviation)).half(), zeros)


def fill(model: Any, weights: DummyWeights, done: Sequence[str], place: Placement, dtype: torch.dtype) -> None:
    """Draw every parameter that is not of a layer in `done`, in the compute dtype."""
    placed = tuple(f"{name}." for name in done)
    for name in weights.names():
        if not name.startswith(placed):
            put(model, name, weights.get(name).to(place.of(name), dtype))
    model.tie_weights()


def put(model: Any, name: str, value: Tensor) -> None:
    """Set a parameter or a buffer of a model by its name."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    kept = value if leaf in module._buffers else nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, kept)
