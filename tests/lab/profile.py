"""Where the time of a prompt and of a decode step goes: kernel by kernel, and how long the device waits for Python.

python -m tests.lab.profile CHECKPOINT --out profile.jsonl
python -m tests.lab.profile dummy:mistral-7b --variant awq-gemm --mode graph --device cuda --out profile.jsonl
"""

import argparse
import functools
import operator
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from bench.records.record import Kernels
from bench.records.scenario import Mode, Scenario
from bench.records.store import append
from bench.worker.clock import Clock, clock_for, seconds_of_each
from bench.worker.machine import fingerprint
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.shell import Parser, command
from quantize.variant import VARIANTS
from tests.lab.records import Operation, ProfileRecord

PASSES = 5  # times that a prompt or a step runs, once for the clock and once more under the profiler


def profile_of(work: Callable[[], object], device_type: str, clock: Clock) -> tuple[float, tuple[Operation, ...]]:
    """Seconds of a pass of `work` once warm, and the operations of one under the profiler, the longest first."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        work()
    wall_s = statistics.median(seconds_of_each([work] * PASSES, clock))
    on_cuda = device_type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(PASSES):
            work()
        clock.settle()
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    total_us = operator.attrgetter("self_device_time_total" if on_cuda else "self_cpu_time_total")
    events = [event for event in seen.key_averages() if event.device_type == wanted and total_us(event)]
    found = [Operation(event.key, event.count / PASSES, total_us(event) / 1e6 / PASSES) for event in events]
    return wall_s, tuple(sorted(found, key=lambda one: -one.seconds))


def profiles(loaded: Any, scenario: Scenario) -> dict[str, tuple[float, tuple[Operation, ...]]]:
    """By phase, what `profile_of` tells of the prompt, and of a decode step after it in the scenario's mode."""
    import torch

    from bench.worker.latency import check_positions, decoders_for, prompts_of
    from quantize.decoding.eager import EagerDecoder

    check_positions(loaded.model, scenario)
    model, device_type = loaded.model, loaded.device.type
    clock = clock_for(device_type)
    [prompt] = prompts_of(scenario, model.config.get_text_config().vocab_size, loaded.device)
    decoder: Any = EagerDecoder(model)
    with torch.no_grad():
        prefill = profile_of(functools.partial(decoder.prefill, prompt), device_type, clock)
        decoder = decoders_for(model, scenario, prompt, loaded.compute_dtype)()
        for _ in range(2):  # the first time, attention may plan each number of keys, which no later step waits for
            decoder.prefill(prompt)
            steps = profile_of(decoder.step, device_type, clock)
        return {"prefill": prefill, f"decode step, {decoder.name}": steps}


def parser() -> Parser:
    cli = Parser(prog="profile", description=__doc__)
    cli.add_argument("source", help="a checkpoint folder that `quantize` made, or dummy:SHAPE")
    cli.add_argument("--variant", choices=list(VARIANTS), help="of a dummy:SHAPE")
    cli.add_argument("--kernel", help="of AWQ weights, as `bench` takes it")
    cli.add_argument("--prompt", type=int, default=256, help="prompt tokens (default %(default)s)")
    cli.add_argument("--mode", choices=get_args(Mode), default="eager", help="how to decode (default %(default)s)")
    cli.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default %(default)s)")
    cli.add_argument("--out", type=Path, required=True, help="a record file to append to")
    return cli


def _loaded(arguments: argparse.Namespace) -> Any:
    from quantize.dummy import DUMMY_PREFIX
    from quantize.loader import load, load_dummy

    how = {"device": arguments.device, "kernel": arguments.kernel}
    if not arguments.source.startswith(DUMMY_PREFIX):
        if arguments.variant is not None:
            raise UserError(f"a checkpoint is of one variant: give --variant for a {DUMMY_PREFIX}SHAPE alone")
        return load(arguments.source, **how)
    if arguments.variant is None:
        raise UserError(f"{arguments.source} needs a --variant: {', '.join(VARIANTS)}")
    return load_dummy(arguments.source.removeprefix(DUMMY_PREFIX), arguments.variant, **how)


def run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints
    scenario = Scenario("profile", arguments.prompt, 3 * PASSES, mode=arguments.mode)
    with quiet_libraries():
        loaded = _loaded(arguments)
        found = profiles(loaded, scenario)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    source = arguments.source if arguments.variant else Path(arguments.source).resolve().name
    kernels, environment = Kernels.of(loaded.kernel, scenario), fingerprint(arguments.device)
    what = when, source, arguments.variant, scenario, kernels, environment
    append(arguments.out, *(ProfileRecord(*what, phase, *figures) for phase, figures in found.items()))
    print(f"the operations: python -m tests.lab.pages {arguments.out}")


main = command(parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
