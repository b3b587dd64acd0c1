"""What a runtime kernel for 4-bit weights has to offer, and whether it multiplies with them at all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quantize.int4.weight import Int4Weight

Style = Literal["GEMM", "GEMV"]  # tiles of several tokens at a time; every token reads all weights on its own
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative, by the dtype multiplied in
GATE_TOKENS = (1, 7, 64, 385)  # a layer is tried with: one, a few, both sides of what kernels take for a long prompt


class Int4Linear(nn.Module):
    """A 4-bit linear layer made ready for one kernel; subclasses hold its buffers.

    forward takes [..., in] in the compute dtype and returns [..., out] in the same dtype, the bias added."""

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


@dataclass(frozen=True)
class Kernel:
    """A way to multiply with 4-bit weights.

    unsupported_reason: (weight, device, compute dtype) -> None when it can run this layer there, else the reason.
    prepare:       (weight, bias, device, compute dtype) -> the layer ready to run.
    way:           tokens -> what really runs for that many.
    compute_dtype: (tokens, compute dtype) -> the dtype that is multiplied in."""

    name: str
    unsupported_reason: Callable[[Int4Weight, torch.device, torch.dtype], str | None]
    prepare: Callable[[Int4Weight, Tensor | None, torch.device, torch.dtype], Int4Linear]
    way: Callable[[int], str]
    compute_dtype: Callable[[int, torch.dtype], torch.dtype] = lambda tokens, dtype: dtype
    style: Style = "GEMM"

    def describe(self, tokens: int, dtype: torch.dtype) -> str:
        """What runs for so many tokens in this compute dtype, as records and tables name it."""
        return f"{self.way(tokens)} ({dtype_name(self.compute_dtype(tokens, dtype))})"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class KernelFault(Exception):  # noqa: N818 - the kernel's fault, whoever called it
    """A kernel gives wrong results: a fault of its own or of how the weights were packed for it."""


def relative_error(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact|, Frobenius norms; infinite where `out` is not finite."""
    error = float((out.double() - exact.double()).norm() / exact.double().norm())
    return error if error == error else float("inf")


@torch.no_grad()
def check_layer(
    kernel: Kernel, layer: Int4Linear, weight: Int4Weight, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare a prepared layer with its dequantized weights in float32, on random inputs.

    layer: what `kernel` made of `weight` without a bias, on `device`, taking `dtype`. Raises KernelFault over BOUNDS.
    """
    out_features, in_features = weight.codes.shape
    exact = weight.to(device).dequantize().t()
    generator = torch.Generator().manual_seed(0)
    for tokens in GATE_TOKENS:
        x = torch.randn((tokens, in_features), generator=generator).to(device, dtype)
        error, bound = relative_error(layer(x), x.float() @ exact), BOUNDS[kernel.compute_dtype(tokens, dtype)]
        if not error <= bound:
            where = f"on a layer of {out_features} x {in_features} with {tokens} tokens"
            wrong = f"the kernel {kernel.name} is wrong by {error:.2g} (bound {bound:g})"
            raise KernelFault(f"{wrong} {where}: choose another --kernel")
