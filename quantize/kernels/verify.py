"""Before a kernel's figures count: does it multiply with these weights at all?"""

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative error |y - y_exact| / |y_exact| by the dtype multiplied in."""

GATE_TOKENS = (1, 7, 64, 257)
"""Numbers of tokens that a layer is tried with: one, a few, and both sides of what kernels take for a long prompt."""


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

    layer: what `kernel` made of `weight` without a bias, on `device`, taking `dtype`. Raises KernelFault over the bound
    of the dtype that the kernel multiplies in.
    """
    out_features, in_features = weight.codes.shape
    exact = weight.to(device).dequantize().t()
    generator = torch.Generator().manual_seed(0)
    for tokens in GATE_TOKENS:
        x = torch.randn((tokens, in_features), generator=generator).to(device, dtype)
        error, bound = relative_error(layer(x), x.float() @ exact), BOUNDS[kernel.compute_dtype(tokens, dtype)]
        if not error <= bound:
            raise KernelFault(
                f"the kernel {kernel.name} is wrong by {error:.2g} (bound {bound:g}) on a layer of {out_features} x "
                f"{in_features} with {tokens} tokens: choose another --kernel"
            )
