"""At how many tokens at once do two ways to run a decoder layer's linear layers cross over?

`python -m bench.crossover --shape mistral-7b --device cuda --out DIR` writes DIR/crossover.jsonl. Tokens at once are
the batch in decode (1 to 32) and the prompt in prefill (64 to 2048).
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.crossover.contenders import Contender, Setting, contenders
from bench.crossover.layer import (
    Layer,
    Linear,
    build_layer,
    layer_error,
    layer_shapes,
    random_inputs,
    reason_of,
    runnable,
)
from bench.records.crossover import CROSSOVER_NAME, DECODE_BATCHES, MIN_TURNS, PROMPT_TOKENS, CrossoverEntry, crossings
from bench.records.store import write
from bench.worker.clock import Clock, clock_for
from bench.worker.machine import fingerprint
from quantize.errors import UserError
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import torch_device
from quantize.model.architecture import group_size_for
from quantize.progress import Progress, progress_bar, silent
from quantize.quiet import quiet_libraries
from quantize.shell import guarded

COUNTS = (*DECODE_BATCHES, *PROMPT_TOKENS)

BUDGET_S = 60.0
TURNS = 9
TURN_S = 0.01
"""A contender's turn is as many passes as fit in this time, at least one."""

Running = tuple[Callable[[], None], float]
"""One pass through all copies of a layer, and about how many seconds it takes."""


def measure_crossover(
    shape: str,
    device: str,
    dtype: str | None = None,
    out: Path = Path("runs"),
    budget_s: float = BUDGET_S,
    progress: Progress = silent,
    *,
    counts: Sequence[int] = COUNTS,
    racing: Sequence[Contender] | None = None,
) -> list[CrossoverEntry]:
    """Time one decoder layer's linear layers in every way there is and write the entries to out/crossover.jsonl.

    shape: a name of quantize.dummy.SHAPES or a path to a config.json; weights and inputs are random. device: "cpu" or
    "cuda"; dtype: the compute dtype, default float32 on a CPU and float16 on CUDA. budget_s: about how long it may
    take; it shortens turns, then their number, and numbers of tokens that it does not reach have that as their reason
    (the first is always measured). racing: who takes part, default all of bench.crossover.contenders.

    Outputs are first compared with the product with the weights in float32; one that differs by more than its
    arithmetic explains is an entry with a reason, not a number. Raises UserError for CUDA where there is none, an
    unknown shape or dtype, and layers that AWQ cannot pack.
    """
    deadline = time.monotonic() + budget_s
    target = torch_device(device)
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise UserError(f"unknown dtype {dtype!r}: use float32, float16 or bfloat16")
    if not budget_s >= 0:
        raise UserError("--budget must be at least 0 seconds")
    counts = sorted(set(counts))
    with quiet_libraries(), torch.no_grad():
        name, linears = layer_shapes(shape)
        compute_dtype = getattr(torch, dtype or ("float32" if target.type == "cpu" else "float16"))
        setting = Setting(target, compute_dtype, group_size_for(linears))
        blank, inputs = blank_entry(name, linears, setting), random_inputs(linears, counts, setting)
        chosen = contenders(compute_dtype) if racing is None else list(racing)
        layers, entries = [], []
        steps = len(chosen) + len(counts)
        for step, contender in enumerate(chosen):
            progress("crossover", step, steps)
            built = build_layer(contender, setting, inputs, blank)
            if isinstance(built, Layer):
                layers.append(built)
            else:
                entries.append(built)
        clock = clock_for(target.type)
        for step, tokens in enumerate(counts):
            progress("crossover", len(chosen) + step, steps)
            left_s = deadline - time.monotonic()
            if step > 0 and left_s <= 0:
                reason = f"not reached within the time budget of {budget_s:g} s"
                entries += [replace(layer.entry, tokens=tokens, reason=reason) for layer in layers]
                continue
            entries += time_layers(layers, tokens, clock, left_s / (len(counts) - step))
        progress("crossover", steps, steps)
    write(out / CROSSOVER_NAME, entries)
    return entries


def blank_entry(shape: str, linears: tuple[Linear, ...], setting: Setting) -> CrossoverEntry:
    """What all entries of one measurement have in common."""
    return CrossoverEntry(
        shape=shape,
        linears=linears,
        group_size=setting.group_size,
        device=setting.device.type,
        compute_dtype=dtype_name(setting.dtype),
        contender="",
        style="dense",
        tokens=None,
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        environment=fingerprint(setting.device.type),
        reason="not measured",
    )


def time_layers(layers: Sequence[Layer], tokens: int, clock: Clock[Any], budget_s: float) -> list[CrossoverEntry]:
    """Check every layer with so many tokens, then time those that hold, in turns A B C, C B A, ..."""
    started = time.monotonic()
    entries: dict[str, CrossoverEntry] = {}
    running: dict[str, Running] = {}
    for layer in layers:
        name = layer.contender.name
        entries[name], ready = get_ready(layer, tokens, clock)
        if ready is not None:
            running[name] = ready
    passes, turns = passes_and_turns([pass_s for _, pass_s in running.values()], budget_s + started - time.monotonic())
    seconds: dict[str, list[float]] = {name: [] for name in running}
    order = list(zip(running, passes, strict=True))
    for turn in range(turns):
        for name, count in order if turn % 2 == 0 else reversed(order):
            try:
                seconds[name].append(timed(running[name][0], count, clock) / (entries[name].copies or 1))
            except Exception as error:
                entries[name] = replace(entries[name], reason=reason_of(error))
                order = [other for other in order if other[0] != name]
    for name, _ in order:
        entries[name] = replace(entries[name], seconds=tuple(seconds[name]), reason=None)
    return list(entries.values())


def get_ready(layer: Layer, tokens: int, clock: Clock[Any]) -> tuple[CrossoverEntry, Running | None]:
    """The layer checked, warmed up and on CUDA captured; None where it is not timed, its entry then has the reason."""
    entry, bound = replace(layer.entry, tokens=tokens), layer.contender.bound(tokens, layer.setting)
    try:
        entry = replace(entry, kernel=layer.contender.kernel(tokens, layer.setting), error_bound=bound)
        error = layer_error(layer, tokens)
        entry = replace(entry, relative_error=error if math.isfinite(error) else None)
        if not error <= bound:  # NaN is over every bound
            return replace(entry, reason=f"wrong: off by {error:.2g} of the float32 product, allowed {bound:g}"), None
        work, mode = runnable(layer, tokens)
        timed(work, 1, clock)
        return replace(entry, mode=mode), (work, max(timed(work, 1, clock), 1e-7))
    except Exception as raised:  # a kernel that fails at this number of tokens
        return replace(entry, reason=reason_of(raised)), None


def passes_and_turns(pass_s: Sequence[float], budget_s: float) -> tuple[list[int], int]:
    """How many passes each contender's turn has, and how many turns, when a pass takes so many seconds.

    TURNS turns of TURN_S each; a budget that is too short for that first takes passes out of the turns, down to one,
    then turns, down to MIN_TURNS.
    """
    budget_s = max(budget_s, 0.0)
    passes = [max(1, round(TURN_S / seconds)) for seconds in pass_s]
    needed_s = TURNS * sum(count * seconds for count, seconds in zip(passes, pass_s, strict=True))
    if needed_s <= budget_s:
        return passes, TURNS
    passes = [max(1, int(count * budget_s / needed_s)) for count in passes]
    turn_s = sum(count * seconds for count, seconds in zip(passes, pass_s, strict=True))
    return passes, min(TURNS, max(MIN_TURNS, int(budget_s / turn_s)))


def timed(work: Callable[[], None], passes: int, clock: Clock[Any]) -> float:
    """Seconds of one of so many passes."""
    clock.settle()
    start = clock.mark()
    for _ in range(passes):
        work()
    return clock.intervals_s([start, clock.mark()])[0] / passes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="crossover", description=__doc__)
    cli.add_argument(
        "--shape", default="mistral-7b", help="mistral-7b, llama-2-7b or a config.json (default %(default)s)"
    )
    cli.add_argument("--device", choices=("cpu", "cuda"), required=True, help="where to run")
    cli.add_argument("--dtype", help="compute dtype; default float32 on a CPU, float16 on CUDA")
    cli.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder for {CROSSOVER_NAME}")
    cli.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds it may take (default 60)")
    return cli


def run(arguments: argparse.Namespace) -> None:
    """Measure, and say in a few lines what crosses over with the dense product."""
    with progress_bar() as progress:
        entries = measure_crossover(
            arguments.shape, arguments.device, arguments.dtype, arguments.out, arguments.budget, progress
        )
    dense = {entry.contender for entry in entries if entry.style == "dense"}
    for crossing in crossings(entries):
        if crossing.tokens is not None and dense & set(crossing.pair):
            print(f"{crossing.faster_below} up to {crossing.tokens:.3g} tokens, then {crossing.faster_above}")
    path = arguments.out / CROSSOVER_NAME
    print(f"{path}: `report {path} --plots` makes tables and plots of it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; return its exit code."""
    return guarded("crossover", lambda: run(parser().parse_args(argv)))
