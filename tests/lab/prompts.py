"""A prompt through tiles of 4-bit weights and through dequantized ones, beside FP16's, on this GPU: milliseconds.

`python -m tests.lab.prompts`: random weights in Mistral-7B's shape. It says when a prompt ended, when the last kernel
was asked for, and how long the GPU was busy: where the first two are the same, Python's calls are what takes the time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from quantize.decoding.eager import EagerDecoder
from quantize.errors import UserError
from quantize.kernels import triton
from quantize.loader import load_dummy
from quantize.quiet import quiet_libraries
from quantize.shell import Parser, command

SHAPE, LENGTHS, BUSY_LENGTHS = "mistral-7b", (207, 264, 335, 370, 589, 1042), (335, 589)
WAYS = {"fp16": {"": 0}, "awq-gemm": {"dequantized": 1, "tiles": max(LENGTHS)}}  # tiles up to so many tokens
WARMUPS, ROUNDS = 2, 7


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds until it ended, and until all of it was asked for."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began), 1e3 * (issued - began)


def busy_ms(work: Callable[[], None]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profile.key_averages()) / 1e3)


@torch.no_grad()
def race(variant: str) -> None:
    """Print a line for each number of tokens and way."""
    model = load_dummy(SHAPE, variant, device="cuda").model
    decoder, vocabulary = EagerDecoder(model), model.config.vocab_size
    prompts = {tokens: torch.randint(0, vocabulary, (1, tokens), device="cuda") for tokens in LENGTHS}
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(WARMUPS + ROUNDS):
        for tokens, prompt in prompts.items():
            for way, few in WAYS[variant].items():
                with mock.patch.object(triton, "FEW_TOKENS", few):
                    times.setdefault((tokens, way), []).append(timed(lambda: decoder.prefill(prompt)))  # noqa: B023
    for (tokens, way), found in times.items():
        whole, issued = zip(*found[WARMUPS:], strict=True)
        line = f"{variant} {way} {tokens} tokens: least {min(whole):.1f}, median {statistics.median(whole):.1f}"
        line += f", asked for after {min(issued):.1f}"
        if tokens in BUSY_LENGTHS:
            with mock.patch.object(triton, "FEW_TOKENS", WAYS[variant][way]), quiet_libraries():
                line += f", GPU busy {busy_ms(lambda: decoder.prefill(prompts[tokens])):.1f}"  # noqa: B023
        print(f"{line} ms", flush=True)


def parser() -> Parser:
    return Parser(prog="prompts", description=__doc__)


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("this times what runs on CUDA: it needs a GPU")
    for variant in WAYS:
        race(variant)


main = command(parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
