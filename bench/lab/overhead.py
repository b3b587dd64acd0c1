"""Our decode loop against a bare `model.generate`, raced in one process: what does being measured cost?

python -m bench.lab.overhead CHECKPOINT --out overhead.jsonl
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records.lab import OverheadRecord
from bench.records.ratio import Ratio, ratio_of
from bench.records.scenario import Scenario
from bench.records.store import append
from bench.worker.machine import fingerprint
from quantize.cli import guarded
from quantize.quiet import quiet_libraries


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="overhead", description=__doc__)
    cli.add_argument("checkpoint", type=Path, help="a checkpoint folder that `quantize` made")
    cli.add_argument("--out", type=Path, required=True, help="a record file to append to")
    cli.add_argument("--prompt", type=int, default=128, help="prompt tokens (default %(default)s)")
    cli.add_argument("--new", type=int, default=65, help="new tokens (default %(default)s)")
    cli.add_argument("--rounds", type=int, default=15, help="turns of each (default %(default)s)")
    cli.add_argument("--dtype", default="float32", help="compute dtype (default %(default)s)")
    cli.add_argument("--device", default="cpu", help="where to run (default %(default)s)")
    return cli


def race(arguments: argparse.Namespace) -> Ratio:
    """Take turns, the order reversed every round; append the samples, return ours over generate's seconds a token."""
    import torch

    from quantize.loader import load

    scenario = Scenario("overhead", arguments.prompt, arguments.new)
    dtype = getattr(torch, arguments.dtype)
    with quiet_libraries():
        model = load(arguments.checkpoint, device=arguments.device, compute_dtype=dtype).model
        for work in TURNS.values():
            work(model, scenario)
        seconds: dict[str, list[float]] = {name: [] for name in TURNS}
        for number in range(arguments.rounds):
            for name in TURNS if number % 2 == 0 else reversed(TURNS):
                seconds[name].append(TURNS[name](model, scenario))
    ratio = ratio_of(seconds["ours"], seconds["generate"])
    record = OverheadRecord(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        checkpoint=arguments.checkpoint.resolve().name,
        scenario=scenario,
        compute_dtype=arguments.dtype,
        decode_s_a_token={name: tuple(values) for name, values in seconds.items()},
        ratio=ratio.value,
        interval=ratio.interval,
        environment=fingerprint(arguments.device),
    )
    append(arguments.out, record)
    return ratio


def ours(model: Any, scenario: Scenario) -> float:
    """Median seconds of a decode step as the worker times them."""
    import statistics

    from bench.worker.clock import clock_for
    from bench.worker.latency import greedy_pass, prompt_ids

    config = model.config.get_text_config()
    clock = clock_for(model.device.type)
    timed = greedy_pass(model, prompt_ids(scenario, config.vocab_size, model.device), scenario.decode_steps, clock)
    return statistics.median(timed.decode_s)


def generate(model: Any, scenario: Scenario) -> float:
    """Seconds a token of a bare greedy `generate`: a long run less one of a single token, over the tokens between."""
    import torch

    from bench.worker.latency import prompt_ids

    prompt = prompt_ids(scenario, model.config.get_text_config().vocab_size, model.device)

    def seconds(new_tokens: int) -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return (seconds(scenario.new_tokens) - seconds(1)) / scenario.decode_steps


TURNS = {"ours": ours, "generate": generate}


def report(arguments: argparse.Namespace) -> None:
    """Race, and say how it went in one line."""
    ratio = race(arguments)
    low, high = ratio.interval or (ratio.value, ratio.value)
    print(f"decode, ours over generate: x{ratio.value:.3f} ({low:.3f} to {high:.3f}), {len(ratio.rounds)} rounds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    return guarded("overhead", lambda: report(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
