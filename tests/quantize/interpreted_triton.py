"""The Triton kernels on a CPU, in Triton's interpreter: run by test_kernels.py with TRITON_INTERPRET=1."""

import pytest
import torch

from quantize.awq.packing import PACKERS
from tests.quantize.test_kernels import CPU, TOKENS, applicable, check_against_reference, check_the_gate, layer

ONE_PROGRAM = (8, 128)
WHOLE_WORDS = (80, 256)
ODD_TILES = (24, 1152)
"""Programs take 4, 16 or 64 rows at a time, and 16, 32 or 128 words of 144."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", sorted(PACKERS))
@pytest.mark.parametrize("name", ["triton", "triton-gemv"])
def test_against_the_reference(name: str, layout: str, group_size: int, tokens: int, dtype: torch.dtype) -> None:
    shapes = [WHOLE_WORDS, ODD_TILES]
    if name == "triton-gemv":  # programs for every token, some milliseconds each in the interpreter
        shapes = [ODD_TILES] if tokens <= TOKENS[1] else [ONE_PROGRAM]
        if tokens == TOKENS[-1] and (group_size, layout, dtype) != (64, "GEMV", torch.float32):
            pytest.skip("as many programs again as for 64 tokens, the same ones: tried once")
    for shape in shapes:
        if applicable(shape, group_size):
            check_against_reference(name, layer(*shape, group_size, layout), tokens, CPU, dtype)


@pytest.mark.parametrize(("name", "rows"), [("triton", 64), ("triton-gemv", 8)])
def test_the_gate_catches_a_swapped_nibble_order(name: str, rows: int) -> None:
    check_the_gate(name, layer(rows, 128, 64, "GEMM"))
