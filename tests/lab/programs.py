"""The Triton programs that choose codes against torch's calls for the same, on this GPU: seconds, and what they choose.

`python -m tests.lab.programs`: two shapes of Mistral-7B's, random weights, and the Gram matrix of random inputs.
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch

from quantize.errors import UserError
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.rounding import gptq
from quantize.rounding.gptq import Target, round_with_feedback, sweep
from quantize.shell import Parser, command

SHAPES = ((4096, 4096), (2048, 14336))
GROUP, TOKENS = 128, 4096


def timed(work: Callable[[], Int4Weight]) -> tuple[Int4Weight, float]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    made = work()
    torch.cuda.synchronize()
    return made, time.perf_counter() - began


def race(rows: int, features: int) -> None:
    """Print a line for the feedback and one for the descent of a weight [rows, features]."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(rows, features, device=device)
    inputs = torch.randn(TOKENS, features, device=device) * torch.rand(features, device=device).exp()
    inputs += inputs.roll(1, 1)
    gram = inputs.t() @ inputs / TOKENS + 0.01 * torch.eye(features, device=device)
    target, nearest = Target.of(gram), round_to_nearest(weight, GROUP)

    def loss(quantized: Int4Weight) -> float:
        difference = quantized.dequantize() - weight
        return float((difference @ gram).mul_(difference).sum())

    works: dict[str, Callable[[], Int4Weight]] = {
        "feedback": lambda: round_with_feedback(weight, target, GROUP),
        "descent": lambda: sweep(nearest, weight, gram),
    }
    for name, work in works.items():
        work()  # Triton compiles
        ours, ours_s = timed(work)
        with mock.patch.object(gptq, "no_programs_reason", return_value="raced"):
            theirs, theirs_s = timed(work)
        same = float((ours.codes == theirs.codes).float().mean())
        times = f"programs {ours_s:.3f} s, torch {theirs_s:.3f} s (x{theirs_s / ours_s:.0f}), same codes {same:.5f}"
        losses = f"nearest {loss(nearest):.5g}, programs {loss(ours):.5g}, torch {loss(theirs):.5g}"
        print(f"{rows} x {features} {name}: {times}, loss {losses}", flush=True)


def parser() -> Parser:
    return Parser(prog="programs", description=__doc__)


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("this races what runs on CUDA: it needs a GPU")
    for rows, features in SHAPES:
        race(rows, features)


main = command(parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
