"""At how many tokens at once do two ways to run a decoder layer's linear layers cross over?

`python -m bench.crossover --shape mistral-7b --device cuda --out DIR` writes DIR/crossover.jsonl. Tokens at once are
the batch in decode (1 to 32) and the prompt in prefill (64 to 2048).
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.crossover.contenders import CannotRun, Contender, Setting, contenders
from bench.records.crossover import COUNTS, CROSSOVER_NAME, MIN_TURNS, CrossoverEntry, Mode, crossings
from bench.records.store import write
from bench.worker.clock import Clock, clock_for
from bench.worker.machine import fingerprint
from quantize.dummy import DummyWeights, dummy_config, write_dummy_folder
from quantize.errors import UserError
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import torch_device, weights_bytes
from quantize.model.architecture import group_size_for
from quantize.progress import Progress, progress_bar
from quantize.quiet import quiet_libraries
from quantize.shell import guarded
from quantize.source import cache_folder

BUDGET_S = 60.0
TURNS = 9
TURN_S = 0.01
"""A contender's turn is as many passes as fit in this time, at least one."""

CACHE_MULTIPLE = 2
"""On a GPU the passes go through copies of the layer that hold so many times the L2 cache together: in a model, a
layer's weights have left the cache by the time the next token asks for them."""

MAX_COPIES = 64
"""A layer so small that this is not enough stays in the cache."""

Linear = tuple[str, int, int]
"""Name, out features, in features."""

Running = tuple[Callable[[], None], float]
"""One pass through all copies of a layer, and about how many seconds it takes."""


@dataclass(frozen=True)
class Inputs:
    """Random activations [1, most tokens, in] for each number of input features; `rows`: those that are checked."""

    x: dict[int, Tensor]
    rows: Tensor


@dataclass(frozen=True)
class Layer:
    """A contender's linear layers, ready to run.

    entry: what is known of it so far; copies: [copy][linear]; expected: place of a linear -> its exact outputs
    [rows, out], one linear of each weight shape.
    """

    contender: Contender
    setting: Setting
    inputs: Inputs
    entry: CrossoverEntry
    copies: list[nn.ModuleList]
    expected: dict[int, Tensor]


def measure_crossover(
    shape: str,
    device: str,
    dtype: str | None = None,
    out: Path = Path("runs"),
    budget_s: float = BUDGET_S,
    progress: Progress | None = None,
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
        progress = progress or Progress()
        for contender in chosen:
            progress.begin(f"crossover: making {contender.name}")
            built = build_layer(contender, setting, inputs, blank)
            if isinstance(built, Layer):
                layers.append(built)
            else:
                entries.append(built)
        clock = clock_for(target.type)
        for step, tokens in enumerate(counts):
            progress.begin(f"crossover: {tokens} tokens, {max(0.0, deadline - time.monotonic()):.0f} s left")
            left_s = deadline - time.monotonic()
            if step > 0 and left_s <= 0:
                reason = f"not reached within the time budget of {budget_s:g} s"
                entries += [replace(layer.entry, tokens=tokens, reason=reason) for layer in layers]
                continue
            entries += time_layers(layers, tokens, clock, left_s / (len(counts) - step))
    write(out / CROSSOVER_NAME, entries)
    return entries


def layer_shapes(shape: str) -> tuple[str, tuple[Linear, ...]]:
    """The model's name, and name, out features and in features of each linear layer of its first decoder layer."""
    from quantize.model.pretrained import empty_model

    name, config = dummy_config(shape)
    model = empty_model(write_dummy_folder(config, name, cache_folder()))
    linears = [
        (path.split(".0.", 1)[1], module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.match(r"\D*\.0\.", path)
    ]
    if not linears:
        raise UserError(f"the decoder layers of {name} have no nn.Linear: choose another model")
    return name.removeprefix("dummy-"), tuple(linears)


def random_inputs(linears: Sequence[Linear], counts: Sequence[int], setting: Setting) -> Inputs:
    """Normal activations; checked are the first, middle and last token of each number of tokens."""
    generator = torch.Generator(setting.device).manual_seed(len(linears))
    x = {}
    for width in sorted({in_features for _, _, in_features in linears}):
        drawn = torch.randn((1, max(counts), width), generator=generator, device=setting.device)
        x[width] = drawn.to(setting.dtype)
    rows = sorted({row for tokens in counts for row in (0, tokens // 2, tokens - 1)})
    return Inputs(x, torch.tensor(rows, device=setting.device))


def build_layer(
    contender: Contender, setting: Setting, inputs: Inputs, blank: CrossoverEntry
) -> Layer | CrossoverEntry:
    """The contender's layers with random weights, as many copies as it takes; or an entry: why there are none."""
    entry = replace(blank, contender=contender.name, style=contender.style)
    expected: dict[int, Tensor] = {}
    copies: list[nn.ModuleList] = []
    copy_bytes, wanted = 0, 1
    try:
        while len(copies) < wanted:
            modules = nn.ModuleList()
            for place, (name, *shape) in enumerate(entry.linears):
                drawn = DummyWeights({f"{name} {len(copies)}": tuple(shape)}, setting.device)
                module, exact = contender.build(drawn.get(f"{name} {len(copies)}").float(), setting)
                modules.append(module.eval())
                if not copies and shape not in [list(entry.linears[known][1:]) for known in expected]:
                    expected[place] = inputs.x[shape[1]][0][inputs.rows].float() @ exact.t()
            copies.append(modules)
            if len(copies) == 1:
                copy_bytes = weights_bytes(modules)
                wanted = copies_wanted(copy_bytes, setting.device)
    except CannotRun as reason:
        return replace(entry, reason=str(reason))
    except Exception as error:  # other people's kernels and no memory left: the others go on
        return replace(entry, reason=reason_of(error))
    entry = replace(entry, weights_bytes=copy_bytes, copies=len(copies))
    return Layer(contender, setting, inputs, entry, copies, expected)


def copies_wanted(copy_bytes: int, device: torch.device) -> int:
    """How many copies of a layer hold CACHE_MULTIPLE times the GPU's L2 cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_COPIES, max(1, -(-CACHE_MULTIPLE * cache_bytes // copy_bytes)))


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def layer_error(layer: Layer, tokens: int) -> float:
    """The largest |found - exact| / |exact| of a checked token's outputs, over one linear of each weight shape."""
    rows = layer.inputs.rows[layer.inputs.rows < tokens]
    errors = []
    for place, expected in layer.expected.items():
        x = layer.inputs.x[layer.entry.linears[place][2]][:, :tokens]
        found, exact = layer.copies[0][place](x)[0][rows].float(), expected[: len(rows)]
        errors.append(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    return float(torch.stack(errors).max())


def runnable(layer: Layer, tokens: int) -> tuple[Callable[[], None], Mode]:
    """One pass through all copies: a CUDA graph's replay where it can be captured, else the calls themselves.

    At one token a fast GPU is done before Python has asked for the next kernel, and what would be timed is Python.
    """
    calls = [
        (module, layer.inputs.x[in_features][:, :tokens])
        for modules in layer.copies
        for module, (_, _, in_features) in zip(modules, layer.entry.linears, strict=True)
    ]

    def work() -> None:
        for module, x in calls:
            module(x)

    if layer.setting.device.type == "cuda" and layer.contender.replayable:
        try:
            return captured(work), "CUDA graph"
        except RuntimeError:  # a kernel that cannot be captured is timed as it is; one that fails will fail again
            torch.cuda.synchronize()
    return work, "eager"


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """The work as a CUDA graph."""
    from quantize.decoding.static import warm_up

    warm_up(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


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


def time_layers(layers: Sequence[Layer], tokens: int, clock: Clock, budget_s: float) -> list[CrossoverEntry]:
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


def get_ready(layer: Layer, tokens: int, clock: Clock) -> tuple[CrossoverEntry, Running | None]:
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


def timed(work: Callable[[], None], passes: int, clock: Clock) -> float:
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
