"""The kernels that need CUDA, their arithmetic stood in for by the formulas that their makers document.

What they compute on a GPU is tested there (marked gpu, in test_kernels.py). What they are handed can be wrong too, the
order of the nibbles first of all, and that shows on a CPU.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantize.int4.layouts import LAYOUTS
from quantize.int4.packing import PACKERS
from quantize.kernels import KERNELS
from quantize.quiet import quiet_libraries
from tests.quantize.kernels.test_kernels import CPU, TOKENS, check_against_reference, check_the_gate, layer

SHAPE = (48, 384)


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation that needs a GPU replaced, and every kernel willing to run here."""
    with quiet_libraries():
        from awq.modules.linear import gemm, gemv
    extension = SimpleNamespace(
        dequantize_weights_cuda=dequantize_weights, gemm_forward_cuda=gemm_forward, gemv_forward_cuda=gemv_forward
    )
    extension.gemmv2_forward_cuda = lambda x, *tensors: gemv_forward(x, *tensors[:-1])  # the last splits the sum
    for module in (gemm, gemv):
        monkeypatch.setattr(module, "awq_ext", extension)
    for name in STOOD_IN:
        willing = dataclasses.replace(KERNELS[name], unsupported_reason=lambda weight, device, dtype: None)
        monkeypatch.setitem(KERNELS, name, willing)


def dequantize_weights(qweight: Tensor, scales: Tensor, qzeros: Tensor, *rest: Any) -> Tensor:
    """autoawq's GEMM layout: [in, out]."""
    from awq.utils.packing_utils import dequantize_gemm

    weight: Tensor = dequantize_gemm(qweight, qzeros, scales, 4, qweight.shape[0] // scales.shape[0])
    return weight


def gemm_forward(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k_iters: int) -> Tensor:
    assert split_k_iters == 8
    return x @ dequantize_weights(qweight, scales, qzeros)


def gemv_forward(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, group_size: int) -> Tensor:
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    weight = LAYOUTS["GEMV"].unpack(tensors, x.shape[1], {"group_size": group_size}).weight
    return x @ weight.dequantize(x.dtype).t()


STOOD_IN = ["autoawq-gemm", "autoawq-gemv"]


@pytest.mark.usefixtures("stood_in")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", sorted(PACKERS))
@pytest.mark.parametrize("name", STOOD_IN)
def test_what_it_is_handed_means_the_weights(name: str, layout: str, group_size: int, tokens: int) -> None:
    check_against_reference(name, layer(*SHAPE, group_size, layout), tokens, CPU, torch.float16)


@pytest.mark.usefixtures("stood_in")
@pytest.mark.parametrize("name", STOOD_IN)
def test_the_gate_would_catch_a_swapped_nibble_order(name: str) -> None:
    check_the_gate(name, layer(*SHAPE, 64, "GEMM"), torch.float16)
