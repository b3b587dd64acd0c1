"""Our Triton kernels: a mat-vec for a few tokens, tiles for more, dequantized weights for a long prompt."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Kernel, Style
from quantize.kernels.block_packing import BLOCK_INPUTS, WordsLinear

SIXTEEN = 0x41800000  # the bits of the float 16.0, which the programs set codes into
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400, torch.float32: 0x64006400}  # 128.0 or 1024.0, twice
FUSED: dict[str, Any] = {"enable_fp_fusion": True}  # product and sum in one instruction: Triton 3.10 wants to be told
WARPS_A_PROCESSOR = 12  # of the mat-vec at least: fewer leave memory waiting; of 128 registers a thread 16 fit at once
ONE_BY_ONE = 2  # tokens up to here go through the mat-vec, each on its own
FEW_TOKENS = 384  # up to here tensor cores multiply tiles of 4-bit weights; above one kernel dequantizes them first
WARP_QUADS = 32  # quads of words that a warp of the mat-vec takes at a time, one a lane
COPY_BYTES = 2**27  # of dequantized weights in memory at a time: the gate projection of a 7B model, 117 MB, fits
MATVEC_ROWS, TILE_ROWS = 4, 64
SMALL_GROUPS = (32, 64)  # sizes below a block of inputs that the programs know; all others are whole blocks
LAUNCHED: dict[tuple[object, ...], Any] = {}  # compiled programs, by all that Triton compiles them for


def launch(
    program: Any, grid: tuple[int, ...], operands: Sequence[Tensor], numbers: Sequence[float], **options: Any
) -> None:
    """Run a program; from the second time on without Triton's look at every argument, most of what a launch costs.

    numbers: what follows the operands, constants included. Triton compiles for each number's divisibility, and for
    pointers that are multiples of 16: others go its own way."""
    key = (id(program), operands[0].device, *(one.dtype for one in operands), *numbers, *options.values())
    made = LAUNCHED.get(key)
    if any(operand.data_ptr() % 16 for operand in operands):
        program[grid](*operands, *numbers, **options, **FUSED)
    elif made is None:
        LAUNCHED[key] = program[grid](*operands, *numbers, **options, **FUSED)
    else:
        made[grid](*operands, *numbers)


def matvec(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], each token on its own."""
    from quantize.kernels.triton_kernels import matvec_program

    out = x.new_empty((x.shape[0], layer.out_features))
    programs = -(-layer.out_features // MATVEC_ROWS)
    warps = warps_a_program(programs, layer.words.shape[1], processors(x.device))
    numbers = (*_sizes(layer), SIXTEEN, layer.group_size, MATVEC_ROWS, WARP_QUADS * warps)
    launch(matvec_program, (programs, x.shape[0], 1), (x, *_operands(layer), out), numbers, num_warps=warps)
    return out


def tiles(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], in tiles of tokens and output features."""
    from quantize.kernels.triton_kernels import tile_program

    tokens = x.shape[0]
    most = 16 if x.dtype == torch.float32 else 128  # what the registers have room for
    lines = min(most, max(16, 1 << (tokens - 1).bit_length()))
    programs = -(-layer.out_features // TILE_ROWS), -(-tokens // lines)
    split = splits(programs[0] * programs[1], processors(x.device) * (1 if lines == 128 else 2))
    out = x.new_empty((split, tokens, layer.out_features), dtype=x.dtype if split == 1 else torch.float32)
    whole = layer.in_features % BLOCK_INPUTS == 0
    numbers = (tokens, *_sizes(layer), MAGIC[x.dtype], split, layer.group_size, lines, TILE_ROWS, whole)
    launch(tile_program, (*programs, split), (x, *_operands(layer), out), numbers, num_stages=3)
    return out[0] if split == 1 else out.sum(dim=0).to(x.dtype)


def dequantize_and_multiply(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], no more than COPY_BYTES of weights dequantized at a time."""
    rows = min(layer.out_features, max(1, COPY_BYTES // (layer.in_features * x.element_size())))
    copy = x.new_empty((rows, layer.in_features))
    if rows == layer.out_features:  # few views: Python's time is what a prompt of some hundred tokens takes
        return functional.linear(x, _dequantized(layer, 0, copy))
    out = x.new_empty((x.shape[0], layer.out_features))
    for start in range(0, layer.out_features, rows):
        weight = _dequantized(layer, start, copy[: layer.out_features - start])
        torch.mm(x, weight.t(), out=out[:, start : start + rows])
    return out


def _dequantized(layer: WordsLinear, start: int, weight: Tensor) -> Tensor:
    """Write the weights of as many output features as `weight` [rows, in] has rows, from `start` on, and return it."""
    from quantize.kernels.triton_kernels import dequantize_program

    rows, columns = weight.shape
    numbers = start, rows, columns, layer.scales.shape[1], MAGIC[weight.dtype], layer.group_size, TILE_ROWS
    grid = -(-rows // TILE_ROWS), -(-columns // BLOCK_INPUTS), 1
    launch(dequantize_program, grid, (*_operands(layer), weight), numbers)
    return weight


@cache
def warps_a_program(programs: int, width: int, multiprocessors: int) -> int:
    """How many warps, 1, 2 or 4, share the words of a mat-vec program's rows: as few as fill the GPU.

    programs: of the launch; width: words a row, of which every warp wants some."""
    wanted = WARPS_A_PROCESSOR * multiprocessors
    useful = -(-width // (4 * WARP_QUADS))
    return next(warps for warps in (1, 2, 4) if warps == 4 or warps >= useful or programs * warps >= wanted)


@cache
def splits(tiles: int, wanted: int) -> int:
    """Among how many programs, 1, 2, 4 or 8, the inputs of a tile are shared: as few as make about so many programs."""
    return next(split for split in (1, 2, 4, 8) if split == 8 or tiles * split >= 0.95 * wanted)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _operands(layer: WordsLinear) -> tuple[Tensor, ...]:
    return layer.words, layer.scales, layer.zeros


def _sizes(layer: WordsLinear) -> tuple[int, int, int]:
    """Output features, input features, groups: the arguments in this order."""
    return layer.out_features, layer.in_features, layer.scales.shape[1]


def no_programs_reason(device: torch.device) -> str | None:
    """Why Triton's programs cannot run on a device, None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, as Triton's own tests run
    if device.type != "cuda" and not interpreted:
        return "runs on CUDA"
    return None if importlib.util.find_spec("triton") else "needs the package triton"


def _unsupported_reason(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    known = weight.group_size in SMALL_GROUPS or weight.group_size % BLOCK_INPUTS == 0
    groups = f"needs groups of 32, 64 or a multiple of {BLOCK_INPUTS}, the layer has {weight.group_size}"
    return no_programs_reason(device) or (None if known else groups)


WAYS = {"mat-vec": matvec, "tiles": tiles, "dequantize + matmul": dequantize_and_multiply}
Way = Callable[[int], str]  # tokens -> the name in WAYS of what multiplies so many contiguous ones


class TritonLinear(WordsLinear):
    def __init__(self, way: Way, *made_of: Any) -> None:
        super().__init__(*made_of)
        self._way = way

    def matmul(self, x: Tensor) -> Tensor:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call] # Triton launches on the current GPU
            return WAYS[self._way(x.shape[0])](self, x.contiguous())


def _kernel(name: str, way: Way, style: Style = "GEMM") -> Kernel:
    layer = partial(TritonLinear, way)
    return Kernel(name, _unsupported_reason, layer, lambda tokens: f"Triton {way(tokens)}", style=style)


def _fastest(tokens: int) -> str:
    few = "mat-vec" if tokens <= ONE_BY_ONE else "tiles"
    return few if tokens <= FEW_TOKENS else "dequantize + matmul"


TRITON = _kernel("triton", _fastest)
TRITON_GEMV = _kernel("triton-gemv", lambda tokens: "mat-vec", style="GEMV")  # what the layout GEMV stood for
