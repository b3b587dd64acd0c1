"""What a runtime kernel for 4-bit weights has to offer. The layout of a file is storage; the kernel is a choice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quantize.int4.weight import Int4Weight

Style = Literal["GEMM", "GEMV"]
"""GEMM: tiles of several tokens and output features at a time. GEMV: every token reads all weights on its own."""


class Int4Linear(nn.Module):
    """A 4-bit linear layer made ready for one kernel; subclasses hold its buffers.

    forward takes [..., in] in the compute dtype and returns [..., out] in the same dtype, the bias added.
    """

    def __init__(self, weight: Int4Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.group_size = weight.group_size
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def matmul(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out], without the bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.matmul(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


@dataclass(frozen=True)
class Kernel:
    """A way to multiply with 4-bit weights.

    name:          short, for `--kernel` and the code.
    unsupported_reason: (weight, device, compute dtype) -> None when it can run this layer there, else the reason.
    prepare:   (weight, bias, device, compute dtype) -> the layer ready to run.
    describe:  (tokens, compute dtype) -> what really runs for that many tokens, as records and tables name it.
    compute_dtype: (tokens, compute dtype) -> the dtype that is multiplied in.
    style:     how it treats several tokens.
    """

    name: str
    unsupported_reason: Callable[[Int4Weight, torch.device, torch.dtype], str | None]
    prepare: Callable[[Int4Weight, Tensor | None, torch.device, torch.dtype], Int4Linear]
    describe: Callable[[int, torch.dtype], str]
    compute_dtype: Callable[[int, torch.dtype], torch.dtype] = lambda tokens, dtype: dtype
    style: Style = "GEMM"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
