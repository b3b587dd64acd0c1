"""Ways to quantize, one row each."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from quantize.dummy import DummyWeights, fill
from quantize.errors import UserError
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import Running
from quantize.methods.awq import AWQ, CT, GPTQ, RTN
from quantize.methods.base import Kernels, Method, Recipe
from quantize.methods.bnb import BNB_4BIT, BNB_8BIT
from quantize.model.pretrained import bring_to, model_of
from quantize.weights import quantization_config


def _load(folder: Path, how: Running, by: str = "torch") -> tuple[Any, Kernels]:
    model = model_of(folder, dtype=how.dtype, device_map=how.place.as_map())
    return model, lambda tokens: f"{by} ({dtype_name(how.dtype)})"


def _draw(model: Any, weights: DummyWeights, how: Running) -> Kernels:
    fill(model, weights, [], how)
    return lambda tokens: f"torch ({dtype_name(how.dtype)})"


REFERENCE = Method("FP16", lambda variant, choices: Recipe(variant, choices.half_dtype), _load, _draw)
"""The half-precision reference: nothing is quantized."""

PACKAGES = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "auto_round", "compressed-tensors": "compressed_tensors",
    "hqq": "hqq", "aqlm": "aqlm", "quanto": "optimum.quanto", "torchao": "torchao", "vptq": "vptq",
    "spqr": "spqr_quant", "eetq": "eetq", "fbgemm_fp8": "fbgemm_gpu", "quark": "quark", "modelopt": "modelopt",
    "mxfp4": "kernels",
}  # fmt: skip
"""By quantization method, the package that transformers reads it with."""


def _load_other(folder: Path, how: Running) -> tuple[Any, Kernels]:
    """By transformers, where the package that its quantization asks for is installed."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    method = str((quantization_config(folder) or {}).get("quant_method"))
    package = PACKAGES.get(method, "")
    if package and not importlib.util.find_spec(package.partition(".")[0]):
        raise UserError(f"it is quantized by {method}, which needs the package {package.replace('_', '-')}")
    if method not in AUTO_QUANTIZER_MAPPING:  # it would be read as if it were not quantized
        raise UserError(f"it is quantized by {method}, which transformers does not read")
    try:
        model, kernels = _load(folder, how, f"transformers {method}")
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another package raises, this checkpoint cannot be read here
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"transformers cannot load what is quantized by {method} here: {why}") from None
    if getattr(model, "hf_quantizer", None) is not None:
        return model, kernels
    bring_to(model, how.dtype)
    return model, lambda tokens: f"transformers {method}, dequantized ({dtype_name(how.dtype)})"


OTHER = Method("other", REFERENCE.recipe, _load_other, _draw)

_ROWS = (REFERENCE, AWQ, RTN, BNB_4BIT, BNB_8BIT, GPTQ, CT, OTHER)
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}
"""By the name that a Variant refers to."""
