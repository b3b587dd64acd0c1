"""Ways to quantize, one row each."""

from typing import Any

import torch

from quantize.checkpoint import Checkpoint
from quantize.dummy import DummyWeights, fill
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Placement
from quantize.methods.awq import AWQ, RTN
from quantize.methods.base import Drawing, Kernels, Method, Recipe
from quantize.methods.bnb import BNB_4BIT, BNB_8BIT
from quantize.model.pretrained import model_of


def _load(checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None) -> tuple[Any, Kernels]:
    return model_of(checkpoint.path, dtype=dtype, device_map=place.as_map()), (f"torch ({dtype_name(dtype)})",) * 2


def _draw(model: Any, weights: DummyWeights, drawing: Drawing) -> Kernels:
    fill(model, weights, [], drawing.place, drawing.dtype)
    return (f"torch ({dtype_name(drawing.dtype)})",) * 2


REFERENCE = Method("FP16", lambda variant, choices: Recipe(variant, choices.half_dtype), _load, _draw)
"""The half-precision reference: nothing is quantized."""

METHODS: dict[str, Method] = {method.name: method for method in (REFERENCE, AWQ, RTN, BNB_4BIT, BNB_8BIT)}
"""By the name that a Variant refers to."""
