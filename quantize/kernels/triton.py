"""Our Triton kernels: a mat-vec for one token, tiles for more, dequantized weights for a long prompt."""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Kernel, dtype_name
from quantize.kernels.block_packing import BLOCK_INPUTS, WordsLinear

SIXTEEN = 0x41800000
"""The bits of the float 16.0, which the programs set codes into."""

FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""A multiplication and an addition in one instruction: Triton 3.9 wants to be told, and 3.10 will not by itself."""

FEW_TOKENS = 64
"""Up to here the tensor cores multiply tiles of 4-bit weights; from here on one kernel dequantizes them once."""

WARPS_A_PROCESSOR = 12
"""So many warps of the mat-vec should fall to each multiprocessor of a GPU: fewer leave its memory waiting, and more
than 16, with 128 registers a thread, take turns."""

WARP_QUADS = 32
"""Quads of words that one warp of the mat-vec and of the dequantizing program takes at a time, one a lane."""

COPY_BYTES = 2**27
"""Dequantized weights that may lie in memory at a time: the gate projection of a 7B model, 117 MB, fits."""

MATVEC_ROWS, TILE_ROWS, COPY_ROWS = 4, 64, 4
SMALL_GROUPS = (32, 64)
"""Group sizes below a block of inputs that the programs know; all others are whole blocks."""


def interpreted() -> bool:
    """Whether Triton runs its programs on a CPU here, as its own tests do (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def matvec(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], each token on its own."""
    from quantize.kernels.triton_kernels import matvec_program

    x = x.contiguous()
    out = x.new_empty((x.shape[0], layer.out_features))
    programs = -(-layer.out_features // MATVEC_ROWS)
    warps = warps_a_program(programs, layer.words.shape[1], processors(x.device))
    matvec_program[(programs, x.shape[0])](
        x, *_operands(layer), out, *_sizes(layer), ROWS=MATVEC_ROWS, QUADS=WARP_QUADS * warps, num_warps=warps, **FUSED
    )
    return out


def tiles(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], in tiles of tokens and output features."""
    from quantize.kernels.triton_kernels import tile_program

    x = x.contiguous()
    tokens = x.shape[0]
    out = x.new_empty((tokens, layer.out_features))
    sizes = (16, 32) if x.dtype == torch.float32 else (16, 32, 64, 128)  # what the registers have room for
    lines = next((size for size in sizes if tokens <= size), sizes[-1])
    grid = (-(-layer.out_features // TILE_ROWS), -(-tokens // lines))
    tile_program[grid](
        x,
        *_operands(layer),
        out,
        tokens,
        *_sizes(layer),
        TOKENS=lines,
        ROWS=TILE_ROWS,
        num_stages=2 if lines == 128 else 3,
        **FUSED,
    )
    return out


def dequantized(layer: WordsLinear, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """The layer's weights for the output features `start` to `stop`: [stop - start, in] in `dtype`."""
    from quantize.kernels.triton_kernels import dequantize_program

    out = torch.empty((stop - start, layer.in_features), dtype=dtype, device=layer.words.device)
    grid = (-(-(stop - start) // COPY_ROWS), -(-layer.words.shape[1] // (4 * WARP_QUADS)))
    operands = [tensor[start:stop] for tensor in _operands(layer)]
    _, *sizes = _sizes(layer)
    dequantize_program[grid](
        *operands, out, stop - start, *sizes, ROWS=COPY_ROWS, QUADS=WARP_QUADS, num_warps=1, **FUSED
    )
    return out


def dequantize_and_multiply(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], no more than COPY_BYTES of weights dequantized at a time."""
    rows = max(1, COPY_BYTES // (layer.in_features * x.element_size()))
    if rows >= layer.out_features:
        return x @ dequantized(layer, x.dtype, 0, layer.out_features).t()
    out = x.new_empty((x.shape[0], layer.out_features))
    for start in range(0, layer.out_features, rows):
        stop = min(start + rows, layer.out_features)
        torch.mm(x, dequantized(layer, x.dtype, start, stop).t(), out=out[:, start:stop])
    return out


@functools.cache
def warps_a_program(programs: int, width: int, multiprocessors: int) -> int:
    """How many warps, 1, 2 or 4, share the words of a mat-vec program's rows: as few as fill the GPU.

    programs: of the launch; width: words a row, of which every warp wants some.
    """
    wanted = WARPS_A_PROCESSOR * multiprocessors
    useful = -(-width // (4 * WARP_QUADS))
    return next(warps for warps in (1, 2, 4) if warps == 4 or warps >= useful or programs * warps >= wanted)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _operands(layer: WordsLinear) -> tuple[Tensor, Tensor, Tensor]:
    return layer.words, layer.scales, layer.zeros


def _sizes(layer: WordsLinear) -> tuple[int, int, int, int, int]:
    """Output features, input features, groups, the bits of 16.0, a group's size: the arguments in this order."""
    return layer.out_features, layer.in_features, layer.scales.shape[1], SIXTEEN, layer.group_size


class TritonGemvLinear(WordsLinear):
    """The mat-vec for every token of a prompt too: what the layout GEMV stood for."""

    def matmul(self, x: Tensor) -> Tensor:
        return matvec(self, x)


class TritonTilesLinear(WordsLinear):
    """The mat-vec for one token, tiles for any more: a long prompt costs no dequantized copy, but slower products."""

    def matmul(self, x: Tensor) -> Tensor:
        return matvec(self, x) if x.shape[0] == 1 else tiles(self, x)


class TritonLinear(WordsLinear):
    """The mat-vec for one token, tiles for a few, dequantized weights for a long prompt."""

    def matmul(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return matvec(self, x)
        if x.shape[0] <= FEW_TOKENS:
            return tiles(self, x)
        return dequantize_and_multiply(self, x)


def _unsupported_reason(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not interpreted():
        return "runs on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if weight.group_size % BLOCK_INPUTS and weight.group_size not in SMALL_GROUPS:
        return f"needs groups of 32, 64 or a multiple of {BLOCK_INPUTS}, the layer has {weight.group_size}"
    return None


def _mat_vec(tokens: int, dtype: torch.dtype) -> str:
    return f"Triton mat-vec ({dtype_name(dtype)})"


def _mat_vec_or_tiles(tokens: int, dtype: torch.dtype) -> str:
    return _mat_vec(tokens, dtype) if tokens == 1 else f"Triton tiles ({dtype_name(dtype)})"


def _fitting(tokens: int, dtype: torch.dtype) -> str:
    if tokens <= FEW_TOKENS:
        return _mat_vec_or_tiles(tokens, dtype)
    return f"Triton dequantize + matmul ({dtype_name(dtype)})"


TRITON = Kernel(name="triton", unsupported_reason=_unsupported_reason, prepare=TritonLinear, describe=_fitting)
TRITON_TILES = Kernel(
    name="triton-tiles", unsupported_reason=_unsupported_reason, prepare=TritonTilesLinear, describe=_mat_vec_or_tiles
)
TRITON_GEMV = Kernel(
    name="triton-gemv",
    unsupported_reason=_unsupported_reason,
    prepare=TritonGemvLinear,
    describe=_mat_vec,
    style="GEMV",
)
