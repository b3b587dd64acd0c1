"""Tensors of a model's files, as a checkpoint holds what is not quantized."""

import torch
from torch import Tensor

from quantize.errors import UserError
from quantize.kernels.base import dtype_name
from quantize.source import check_finite


def half(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in half precision, others as they are. Raises UserError when a value does not fit."""
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not bool(torch.isfinite(converted.sum(dtype=torch.float32))) and not bool(torch.isfinite(converted).all()):
        check_finite(name, tensor)
        raise UserError(
            f"weight {name} holds {float(tensor.abs().max()):.3g}, more than {dtype_name(dtype)} can: give a model "
            "that is in bfloat16 as a whole, or choose bnb-4bit, which keeps it"
        )
    return converted
