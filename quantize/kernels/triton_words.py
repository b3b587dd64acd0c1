"""Our Triton kernels: a mat-vec for one token, tiles for a few, dequantized weights for a long prompt."""

import importlib.util
import os

import torch
from torch import Tensor

from quantize.awq.int4 import Int4Weight
from quantize.kernels.base import Kernel, dtype_name
from quantize.kernels.words import WordsLinear

FEW_TOKENS = 64
"""Up to here the tensor cores multiply tiles of 4-bit weights; from here on it pays to dequantize them once."""

PROGRAMS_A_PROCESSOR = 4
"""So many programs should fall to each multiprocessor of a GPU: fewer leave its memory waiting."""

MATVEC_WORDS = 128
TILE_ROWS, TILE_WORDS = 64, 16
COPY_ROWS, COPY_WORDS = 16, 32


def interpreted() -> bool:
    """Whether Triton runs its programs on a CPU here, as its own tests do (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def matvec(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], each token on its own."""
    from quantize.kernels.triton_programs import matvec_program

    x = x.contiguous()
    out = x.new_empty((x.shape[0], layer.out_features))
    rows = rows_a_program(layer.out_features, processors(x.device))
    grid = (-(-layer.out_features // rows), x.shape[0])
    matvec_program[grid](x, *_operands(layer), out, *_sizes(layer), ROWS=rows, WORDS=MATVEC_WORDS)
    return out


def tiles(layer: WordsLinear, x: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out], in tiles of tokens and output features."""
    from quantize.kernels.triton_programs import tile_program

    x = x.contiguous()
    tokens = x.shape[0]
    out = x.new_empty((tokens, layer.out_features))
    lines = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    grid = (-(-layer.out_features // TILE_ROWS), -(-tokens // lines))
    tile_program[grid](
        x, *_operands(layer), out, tokens, *_sizes(layer), TOKENS=lines, ROWS=TILE_ROWS, WORDS=TILE_WORDS
    )
    return out


def dequantized(layer: WordsLinear, dtype: torch.dtype) -> Tensor:
    """The layer's weights [out, in] in `dtype`."""
    from quantize.kernels.triton_programs import dequantize_program

    out = torch.empty((layer.out_features, layer.in_features), dtype=dtype, device=layer.words.device)
    grid = (-(-layer.out_features // COPY_ROWS), -(-layer.words.shape[1] // COPY_WORDS))
    dequantize_program[grid](*_operands(layer), out, *_sizes(layer), ROWS=COPY_ROWS, WORDS=COPY_WORDS)
    return out


def rows_a_program(out_features: int, multiprocessors: int) -> int:
    """How many output features one mat-vec program takes: as many as leave enough programs, up to 8."""
    wanted = PROGRAMS_A_PROCESSOR * multiprocessors
    return next((rows for rows in (8, 4, 2) if out_features >= rows * wanted), 1)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _operands(layer: WordsLinear) -> tuple[Tensor, Tensor, Tensor]:
    return layer.words, layer.scales, layer.zeros


def _sizes(layer: WordsLinear) -> tuple[int, int, int, int]:
    """Output features, input features, groups, words a group: the programs' arguments in this order."""
    return layer.out_features, layer.in_features, layer.scales.shape[1], layer.group_size // 8


class TritonGemvLinear(WordsLinear):
    """The mat-vec for every token of a prompt too: what the layout GEMV stood for."""

    def matmul(self, x: Tensor) -> Tensor:
        return matvec(self, x)


class TritonLinear(WordsLinear):
    """The fitting one of the three for each number of tokens."""

    def matmul(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return matvec(self, x)
        if x.shape[0] <= FEW_TOKENS:
            return tiles(self, x)
        return x @ dequantized(self, x.dtype).t()


def _why_not(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not interpreted():
        return "runs on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if weight.group_size % 8:
        return f"needs groups in multiples of 8, the layer has {weight.group_size}"
    return None


def _describe(tokens: int, dtype: torch.dtype) -> str:
    if tokens == 1:
        return f"Triton mat-vec ({dtype_name(dtype)})"
    if tokens <= FEW_TOKENS:
        return f"Triton tiles ({dtype_name(dtype)})"
    return f"Triton dequantize + matmul ({dtype_name(dtype)})"


TRITON = Kernel(name="triton", why_not=_why_not, prepare=TritonLinear, describe=_describe)
TRITON_GEMV = Kernel(
    name="triton-gemv",
    why_not=_why_not,
    prepare=TritonGemvLinear,
    describe=lambda tokens, dtype: f"Triton mat-vec ({dtype_name(dtype)})",
    style="GEMV",
)
