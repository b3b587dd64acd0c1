"""What a user may choose of the rounding; a manifest states these objects, and these objects run. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from quantize.errors import UserError

Rounding = Literal["nearest", "gptq"]
QuantType = Literal["nf4", "fp4"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class AwqOptions:
    """How to search and round.

    group_size: weights that share a scale and a zero point.
    search:     False rounds the weights as they are.
    clip:       search the clipping of each group's range.
    rounding:   "nearest", or "gptq" for error feedback inside the ranges that the search chose.
    refit:      fit the scales to the codes afterwards."""

    group_size: int
    search: bool = True
    clip: bool = True
    rounding: Rounding = "nearest"
    refit: bool = True


@dataclass(frozen=True)
class BnbOptions:
    """How bnb-4bit stores and rounds its weights; bnb-8bit has no options.

    quant_type:   "nf4" (QLoRA, arXiv 2305.14314) or "fp4".
    double_quant: quantize the scales too, which saves about 0.4 bits a weight.
    blocksize:    how many weights share a scale.
    rounding:     "nearest", or "gptq" for error feedback on calibration text."""

    quant_type: QuantType = "nf4"
    double_quant: bool = False
    blocksize: int = 64
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        if self.quant_type not in get_args(QuantType):
            raise UserError(f"4-bit type {self.quant_type!r}: choose one of {', '.join(get_args(QuantType))}")
        if self.blocksize not in BLOCK_SIZES:
            raise UserError(f"4-bit block size {self.blocksize}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
