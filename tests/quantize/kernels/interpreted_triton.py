"""The Triton kernels on a CPU, in Triton's interpreter: run by test_kernels.py with TRITON_INTERPRET=1."""

import contextlib
import dataclasses

import pytest
import torch

from quantize.kernels import KERNELS, triton
from quantize.kernels.base import BOUNDS, relative_error
from quantize.kernels.block_packing import WordsLinear
from quantize.quiet import quiet_libraries
from tests.quantize.kernels.test_kernels import CPU, TOKENS, applicable, check_against_reference, check_the_gate, layer

ONE_PROGRAM, TWO_PROGRAMS = (8, 128), (8, 384)
WHOLE_BLOCKS = (80, 256)
HALF_A_BLOCK = (8, 576)
ODD_TILES = (24, 1152)
"""Programs take 4 or 64 rows at a time, and one of 1 or 8 blocks of inputs, of which there are 9."""

OURS = ["triton", "triton-gemv"]
MANY = TOKENS[-1]


CASES = [
    (name, group_size, tokens, dtype)
    for name in OURS
    for group_size in (32, 64, 128)
    for tokens in TOKENS
    for dtype in (torch.float32, torch.float16)
    if name != "triton-gemv" or tokens != MANY  # the same program, as often as there are tokens
]


@pytest.mark.parametrize(("name", "group_size", "tokens", "dtype"), CASES)
def test_against_the_reference(name: str, group_size: int, tokens: int, dtype: torch.dtype) -> None:
    shapes = [WHOLE_BLOCKS, HALF_A_BLOCK, ODD_TILES]
    if name == "triton-gemv":  # a program for every token and four rows, some 25 milliseconds each in the interpreter
        tokens = min(tokens, 20)
        few = [ODD_TILES] if tokens == 1 else [TWO_PROGRAMS]
        shapes = few if tokens <= TOKENS[1] else [ONE_PROGRAM]
    fitting = [shape for shape in shapes if applicable(shape, group_size)]
    assert fitting
    for shape in fitting:
        check_against_reference(name, layer(*shape, group_size, "GEMM"), tokens, CPU, dtype)


@pytest.mark.parametrize("copies", [3, 8, 23])
def test_a_long_prompt_in_parts_of_the_weight(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "COPY_BYTES", ODD_TILES[1] * 4 * ODD_TILES[0] // copies)
    check_against_reference("triton", layer(*ODD_TILES, 64, "GEMM"), triton.FEW_TOKENS + 1, CPU, torch.float32)


@pytest.mark.parametrize("tokens", [7, 40])
def test_the_inputs_of_a_tile_are_shared_where_that_fills_the_gpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "processors", lambda device: 132)
    assert triton.splits(1, 264) == 8
    check_against_reference("triton", layer(*ODD_TILES, 32, "GEMM"), tokens, CPU, torch.float16)


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_what_lies_behind_the_last_group_in_memory_counts_for_nothing(tokens: int) -> None:
    weight = layer(*HALF_A_BLOCK, 64, "GEMM")
    made = KERNELS["triton"].prepare(weight, None, CPU, torch.float16)
    assert isinstance(made, WordsLinear)
    beyond = torch.full((made.scales.numel() + 64,), torch.nan, dtype=torch.float16)
    beyond[: made.scales.numel()] = made.scales.flatten()
    made.scales = beyond[: made.scales.numel()].view(made.scales.shape)
    x = torch.randn((tokens, HALF_A_BLOCK[1]), generator=torch.Generator().manual_seed(0)).half()
    assert relative_error(made(x), x.double() @ weight.dequantize(torch.float64).t()) < BOUNDS[torch.float16]


@pytest.mark.parametrize(("name", "rows"), [("triton", 64), ("triton-gemv", 4)])
def test_the_gate_catches_a_swapped_nibble_order(name: str, rows: int) -> None:
    check_the_gate(name, layer(rows, 128, 64, "GEMV"))


@pytest.fixture
def autoawq_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """autoawq's wrappers around its Triton programs make their tensors' GPU the current one first: a CPU needs none."""
    with quiet_libraries():
        from awq.modules.triton import gemm
    monkeypatch.setattr(gemm, "get_same_device_cm", lambda tensor: contextlib.nullcontext())
    anywhere = dataclasses.replace(KERNELS["autoawq-gemm"], unsupported_reason=lambda weight, device, dtype: None)
    monkeypatch.setitem(KERNELS, "autoawq-gemm", anywhere)


@pytest.mark.usefixtures("autoawq_on_cpu")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_autoawqs_own_against_the_reference(group_size: int, tokens: int) -> None:
    for shape in [WHOLE_BLOCKS, ODD_TILES]:
        if applicable(shape, group_size):
            check_against_reference("autoawq-gemm", layer(*shape, group_size, "GEMM"), tokens, CPU, torch.float16)


@pytest.mark.usefixtures("autoawq_on_cpu")
def test_the_gate_catches_a_swapped_nibble_order_in_autoawqs_own() -> None:
    check_the_gate("autoawq-gemm", layer(64, 128, 64, "GEMM"), torch.float16)
