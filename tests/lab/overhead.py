"""Our decode loop against a bare `model.generate`, raced in one process: what does being measured cost?

python -m tests.lab.overhead CHECKPOINT --out overhead.jsonl
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.records.ratio import ratio_of
from bench.records.scenario import Scenario
from bench.records.store import append
from bench.worker.clock import clock_for, seconds_of_each
from bench.worker.latency import prompts_of, timed_pass
from bench.worker.machine import fingerprint
from quantize.decoding.eager import EagerDecoder
from quantize.loader import load
from quantize.quiet import quiet_libraries
from quantize.shell import guarded
from tests.lab.records import OverheadRecord


def race(arguments: argparse.Namespace) -> None:
    """Take turns, the order reversed every round; append the samples, and say how it went in one line."""
    scenario, device = Scenario("overhead", arguments.prompt, arguments.new), arguments.device
    seconds: dict[str, list[float]] = {name: [] for name in TURNS}
    with quiet_libraries():
        dtype = getattr(torch, arguments.dtype)
        model = load(arguments.checkpoint, device=device, compute_dtype=dtype).model
        [prompt] = prompts_of(scenario, model.config.get_text_config().vocab_size, model.device)
        for work in TURNS.values():
            work(model, prompt, scenario)
        for number in range(arguments.rounds):
            for name in TURNS if number % 2 == 0 else reversed(TURNS):
                seconds[name].append(TURNS[name](model, prompt, scenario))
    ratio = ratio_of(seconds["ours"], seconds["generate"])
    when, folder = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), arguments.checkpoint.resolve().name
    raced = scenario, arguments.dtype, {name: tuple(values) for name, values in seconds.items()}
    append(arguments.out, OverheadRecord(when, folder, *raced, ratio.value, ratio.interval, fingerprint(device)))
    low, high = ratio.interval or (ratio.value, ratio.value)
    print(f"decode, ours over generate: x{ratio.value:.3f} ({low:.3f} to {high:.3f}), {len(ratio.rounds)} rounds")


def ours(model: Any, prompt: Tensor, scenario: Scenario) -> float:
    """Median seconds of a decode step as the worker times them."""
    clock = clock_for(model.device.type)
    return statistics.median(timed_pass(lambda: EagerDecoder(model), [prompt], scenario.decode_steps, clock).decode_s)


def generate(model: Any, prompt: Tensor, scenario: Scenario) -> float:
    """Seconds a token of a bare greedy `generate`: a long run less one of a single token, over the tokens between."""

    def run(new: int) -> None:
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    with torch.no_grad():
        works = [lambda: run(scenario.new_tokens), lambda: run(1)]
        long_s, short_s = seconds_of_each(works, clock_for(model.device.type))
    return (long_s - short_s) / scenario.decode_steps


TURNS = {"ours": ours, "generate": generate}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    cli = argparse.ArgumentParser(prog="overhead", description=__doc__)
    add = cli.add_argument
    add("checkpoint", type=Path, help="a checkpoint folder that `quantize` made")
    add("--out", type=Path, required=True, help="a record file to append to")
    add("--prompt", type=int, default=128, help="prompt tokens (default %(default)s)")
    add("--new", type=int, default=65, help="new tokens (default %(default)s)")
    add("--rounds", type=int, default=15, help="turns of each (default %(default)s)")
    add("--dtype", default="float32", help="compute dtype (default %(default)s)")
    add("--device", default="cpu", help="where to run (default %(default)s)")
    return guarded("overhead", lambda: race(cli.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
