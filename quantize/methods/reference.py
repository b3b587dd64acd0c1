"""The half-precision reference: nothing is quantized."""

from typing import Any

import torch

from quantize.checkpoint import Checkpoint
from quantize.dummy import DummyWeights, fill
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Placement
from quantize.methods.base import Drawing, Kernels, Method, Recipe
from quantize.model.pretrained import model_of


def _load(checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None) -> tuple[Any, Kernels]:
    return model_of(checkpoint.path, dtype=dtype, device_map=place.as_map()), _kernels(dtype)


def _draw(model: Any, weights: DummyWeights, drawing: Drawing) -> Kernels:
    fill(model, weights, [], drawing.place, drawing.dtype)
    return _kernels(drawing.dtype)


def _kernels(dtype: torch.dtype) -> Kernels:
    name = f"torch ({dtype_name(dtype)})"
    return name, name


REFERENCE = Method("FP16", lambda variant, choices: Recipe(variant, choices.half_dtype), _load, _draw)
