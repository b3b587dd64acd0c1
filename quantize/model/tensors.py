"""Tensors of a model's files, as a checkpoint holds what is not quantized."""

import torch
from torch import Tensor

from quantize.kernels.base import dtype_name
from quantize.source import check_finite


def half(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in half precision, others as they are. Raises UserError when a value does not fit."""
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    check_finite(f"{name}, rounded to {dtype_name(dtype)},", converted)
    return converted
