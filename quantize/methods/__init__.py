"""Ways to quantize, one row each."""

from pathlib import Path
from typing import Any

from quantize.dummy import DummyWeights, fill
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Running
from quantize.methods.awq import AWQ, RTN
from quantize.methods.base import Kernels, Method, Recipe
from quantize.methods.bnb import BNB_4BIT, BNB_8BIT
from quantize.model.pretrained import model_of


def _load(folder: Path, how: Running) -> tuple[Any, Kernels]:
    return model_of(folder, dtype=how.dtype, device_map=how.place.as_map()), (f"torch ({dtype_name(how.dtype)})",) * 2


def _draw(model: Any, weights: DummyWeights, how: Running) -> Kernels:
    fill(model, weights, [], how)
    return (f"torch ({dtype_name(how.dtype)})",) * 2


REFERENCE = Method("FP16", lambda variant, choices: Recipe(variant, choices.half_dtype), _load, _draw)
"""The half-precision reference: nothing is quantized."""

METHODS: dict[str, Method] = {method.name: method for method in (REFERENCE, AWQ, RTN, BNB_4BIT, BNB_8BIT)}
"""By the name that a Variant refers to."""
