"""Does a scale search on some of the rows choose what one on all of them chooses?

`python -m tests.lab.agreement` prints a table: the embedded model's layers as they are, and wider ones that are drawn,
with heavy-tailed weights, features that share a few directions, and some features far louder than the others.
`--drawn --device cuda` does the wider ones alone, on a GPU: the widest takes a CPU the better part of an hour.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.building import layer as layers
from quantize.calibration import builtin_texts, token_blocks
from quantize.int4.weight import minmax_range, rounded
from quantize.model.pretrained import tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.rounding import awq_search
from quantize.rounding.awq_search import MOST_WEIGHTS, SOME_WEIGHTS, Reader, ScaleChoice, search_scale
from quantize.rounding.gram import StatsAccumulator, row_errors
from quantize.rounding.options import AwqOptions
from quantize.shell import guarded
from quantize.source import open_source
from tests.lab.quantizers import ours

SAMPLES = (256, 512, 1024, 2048, None)  # rows; None: as the search has them, some for all scales, most for the best
DRAWN = {2048: (12288, 128), 4096: (28672, 128), 14336: (4096, 128)}  # width -> (rows, group size)
DRAWS, TOKENS, DIRECTIONS = 3, 8192, 64

Search = tuple[Sequence[Reader], int, Tensor]


def drawn(width: int, rows: int, seed: int, device: torch.device) -> Reader:
    """A linear layer [rows, width] and the statistics of inputs to it, on a device."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    loudness = (0.8 * normal(width)).exp()
    loudness[torch.randperm(width, generator=chance)[: max(2, width // 500)]] *= 20
    directions = normal(DIRECTIONS, width) / DIRECTIONS**0.5
    accumulator = StatsAccumulator(width, device)
    for _ in range(TOKENS // 1024):
        accumulator.add(((normal(1024, DIRECTIONS) @ directions + normal(1024, width)) * loudness).to(device))
    tails = (normal(rows, width).square_() + normal(rows, width).square_() + normal(rows, width).square_()).div_(3)
    weight = normal(rows, width).div_(tails.sqrt_().clamp_(min=0.2)) * (0.3 * normal(rows, 1)).exp() * 0.02
    return Reader(weight.to(device), accumulator.finish(), torch.arange(width, device=device))


def of_model(source: str) -> Iterator[tuple[int, Search]]:
    """Width, and what was searched, of each group of scales in a model."""
    found: list[Search] = []

    def note(*search: Any) -> ScaleChoice:
        found.append(search)
        return search_scale(*search)

    with quiet_libraries():
        folder = open_source(source).folder
        blocks = token_blocks(builtin_texts("calibration"), tokenizer_of(folder), blocks=48, block_tokens=256)
        layers.search_scale = note  # type: ignore[assignment,attr-defined]
        ours(str(folder), blocks, 64, AwqOptions(64))
    return (((search[0][0].weight.shape[1], search)) for search in found)


def loss(readers: Sequence[Reader], group_size: int, scales: Tensor) -> float:
    """On all rows, with these scales."""
    total = 0.0
    for one in readers:
        spread = one.spread(scales)
        grouped = (one.weight * spread).view(len(one.weight), -1, group_size)
        change = rounded(grouped, *minmax_range(grouped)).view(one.weight.shape).div_(spread).sub_(one.weight)
        total += one.share * float(row_errors(change, one.stats.gram_lowp).sum())
    return total


def compared(searches: Sequence[Search]) -> list[str]:
    """For each sample size: how often the exponent is that of all rows, and by how much the loss on all grows."""
    cells, default = [], (SOME_WEIGHTS, MOST_WEIGHTS)
    for most in SAMPLES:
        same, growth = 0, 0.0
        for readers, group_size, free in searches:
            awq_search.SOME_WEIGHTS = awq_search.MOST_WEIGHTS = sys.maxsize
            exact = search_scale(readers, group_size, free)
            weights = most and most * readers[0].weight.shape[1]
            awq_search.SOME_WEIGHTS, awq_search.MOST_WEIGHTS = (weights, weights) if weights else default
            found = search_scale(readers, group_size, free)
            same += found.exponent == exact.exponent
            if found.exponent != exact.exponent:
                awq_search.MOST_WEIGHTS = sys.maxsize
                growth = max(growth, loss(readers, group_size, found.scales) / exact.loss - 1)
        cells.append(f"{same} of {len(searches)}" + (f", +{growth:.1%}" if growth else ""))
    return cells


def agreement(drawn_alone: bool, device: str) -> None:
    by_width: dict[str, list[Search]] = {}
    for width, search in () if drawn_alone else of_model("smollm2-135m"):
        by_width.setdefault(f"{width}, SmolLM2-135M", []).append(search)
    print("| Width | Rows | " + " | ".join(f"{most} rows" if most else "default" for most in SAMPLES) + " |")
    print("|---|---|" + "---|" * len(SAMPLES))
    for name, searches in by_width.items():
        rows = max(sum(len(one.weight) for one in readers) for readers, *_ in searches)
        print(f"| {name} | up to {rows} | {' | '.join(compared(searches))} |", flush=True)
    for width, (rows, group_size) in DRAWN.items():
        free = torch.ones(width, dtype=torch.bool, device=device)
        made = [([drawn(width, rows, seed, torch.device(device))], group_size, free) for seed in range(DRAWS)]
        print(f"| {width}, drawn | {rows} | {' | '.join(compared(made))} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawn", dest="drawn_alone", action="store_true", help="leave the embedded model out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the layers that are drawn")
    given = parser.parse_args()
    return guarded("agreement", lambda: agreement(**vars(given)))


if __name__ == "__main__":
    sys.exit(main())
