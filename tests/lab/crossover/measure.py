"""Each way to run a decoder layer's linear layers, timed by the tokens that go through at once."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.records.store import write
from bench.worker.clock import Clock, clock_for
from bench.worker.machine import fingerprint
from quantize.dummy import DummyWeights, dummy_config, write_dummy_folder
from quantize.errors import UserError
from quantize.kernels.base import dtype_name
from quantize.loading.device_map import torch_device, weights_bytes
from quantize.model.architecture import group_size_for
from quantize.progress import Progress
from quantize.quiet import quiet_libraries
from quantize.source import cache_folder
from tests.lab.crossover.contenders import CannotRun, Contender, Setting, contenders
from tests.lab.crossover.crossings import COUNTS, CROSSOVER_NAME, MIN_TURNS
from tests.lab.records import CrossoverEntry, Linear, Mode

TURNS = 9
GRAPH_ERROR = 0.05  # of the outputs: the same kernels on the same numbers, summed up in another order at most
TURN_S = 0.01  # a contender's turn is as many passes as fit in this time, at least one
CACHE_MULTIPLE, MAX_COPIES = 2, 64
"""On a GPU the passes go through copies of the layer that hold so many times the L2 cache together: in a model, a
layer's weights have left the cache by the time the next token asks for them. At most so many copies."""


@dataclass(frozen=True)
class Workload:
    """What every contender computes: a decoder layer's linear layers with random weights, on random activations.

    entry: what all entries have in common; x: in features -> activations [1, most tokens, in]; rows: the tokens that
    are checked, the first, middle and last of each number of tokens.
    """

    entry: CrossoverEntry
    setting: Setting
    x: dict[int, Tensor]
    rows: Tensor

    @staticmethod
    def of(shape: str, linears: tuple[Linear, ...], setting: Setting, counts: Sequence[int]) -> "Workload":
        """The layer of the model of this name, with up to so many tokens at once."""
        device, when = setting.device.type, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        what = (shape, linears, setting.group_size, device, dtype_name(setting.dtype))
        entry = CrossoverEntry(*what, "", "dense", None, when, fingerprint(device), reason="not measured")
        drawn, x = torch.Generator(setting.device).manual_seed(len(linears)), {}
        for width in sorted({inner for _, _, inner in linears}):
            numbers = torch.randn((1, max(counts), width), generator=drawn, device=setting.device)
            x[width] = numbers.to(setting.dtype)
        rows = sorted({row for tokens in counts for row in (0, tokens // 2, tokens - 1)})
        return Workload(entry, setting, x, torch.tensor(rows, device=setting.device))


@dataclass(frozen=True)
class Layer:
    """A contender's linear layers, ready to run.

    entry: what is known of it so far; calls: a pass, each linear of each copy with its activations; checks: of one
    linear of each weight shape the module, its activations, and its exact outputs [rows, out].
    """

    contender: Contender
    work: Workload
    entry: CrossoverEntry
    calls: list[tuple[nn.Module, Tensor]]
    checks: dict[tuple[int, int], tuple[nn.Module, Tensor, Tensor]]


def measure_crossover(
    shape: str,
    device: str,
    dtype: str | None = None,
    out: Path = Path("runs"),
    budget_s: float = 60.0,
    progress: Progress | None = None,
    *,
    counts: Sequence[int] = COUNTS,
    racing: Sequence[Contender] | None = None,
) -> list[CrossoverEntry]:
    """Time one decoder layer's linear layers in every way there is and write the entries to out/crossover.jsonl.

    shape: a name of quantize.dummy.SHAPES or a path to a config.json. device: "cpu" or "cuda"; dtype: the compute
    dtype, default float32 on a CPU and float16 on CUDA. budget_s: about how long it may take; it takes away turns, and
    numbers of tokens that it does not reach have that as their reason (the first is always measured). racing: who takes
    part, default all of tests.lab.crossover.contenders.

    Outputs are first compared with the float32 weights' product; one that differs by more than its arithmetic explains
    has a reason, no seconds. Raises UserError without CUDA, for an unknown shape, and layers that AWQ cannot pack.
    """
    deadline = time.monotonic() + budget_s
    target, counts = torch_device(device), sorted(set(counts))
    if not budget_s >= 0:
        raise UserError("--budget must be at least 0 seconds")
    compute_dtype = getattr(torch, dtype or ("float32" if target.type == "cpu" else "float16"))
    racing = contenders(compute_dtype) if racing is None else racing
    progress = progress or Progress()
    layers: list[Layer] = []
    entries: list[CrossoverEntry] = []
    with quiet_libraries(), torch.no_grad():
        name, linears = layer_shapes(shape)
        work = Workload.of(name, linears, Setting(target, compute_dtype, group_size_for(linears)), counts)
        for contender in racing:
            progress.begin(f"crossover: making {contender.name}")
            entry = replace(work.entry, contender=contender.name, style=contender.style)
            try:
                layers.append(build_layer(contender, work, entry))
            except Exception as error:  # other people's kernels and no memory left: the others go on
                entries.append(replace(entry, reason=reason_of(error)))
        for step, tokens in enumerate(counts):
            now = time.monotonic()
            progress.begin(f"crossover: {tokens} tokens, {max(0.0, deadline - now):.0f} s left")
            if step > 0 and now >= deadline:
                reason = f"not reached within the time budget of {budget_s:g} s"
                entries += [replace(layer.entry, tokens=tokens, reason=reason) for layer in layers]
            else:
                until = now + (deadline - now) / (len(counts) - step)
                entries += time_layers(layers, tokens, clock_for(target.type), until)
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


def build_layer(contender: Contender, work: Workload, entry: CrossoverEntry) -> Layer:
    """The contender's layers, as many copies as it takes. Raises CannotRun, and whatever a kernel raises."""
    calls: list[tuple[nn.Module, Tensor]] = []
    checks: dict[tuple[int, int], tuple[nn.Module, Tensor, Tensor]] = {}
    copies, copy_bytes = 0, 0
    while not copies or copies < copies_wanted(copy_bytes, work.setting.device):
        modules = nn.ModuleList()
        for name, out, inner in entry.linears:
            drawn = DummyWeights({name: (out, inner)}, work.setting.device).get(name).float()
            module, exact = contender.build(drawn, work.setting)
            modules.append(module.eval())
            calls.append((module, x := work.x[inner]))
            if (out, inner) not in checks:
                checks[out, inner] = module, x, x[0][work.rows].float() @ exact.t()
        copies += 1
        copy_bytes = copy_bytes or weights_bytes(modules)
    return Layer(contender, work, replace(entry, weights_bytes=copy_bytes, copies=copies), calls, checks)


def copies_wanted(copy_bytes: int, device: torch.device) -> int:
    """How many copies of a layer hold CACHE_MULTIPLE times the GPU's L2 cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_COPIES, max(1, -(-CACHE_MULTIPLE * cache_bytes // copy_bytes)))


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, CannotRun) else f"{type(error).__name__}: {first[:200]}"


def time_layers(layers: Sequence[Layer], tokens: int, clock: Clock, until_s: float) -> list[CrossoverEntry]:
    """Check every layer with so many tokens, then time those that hold, in turns A B C, C B A, ... until `until_s`."""
    ready = [get_ready(layer, tokens, clock) for layer in layers]
    seconds: list[list[float]] = [[] for _ in ready]
    racing = [(place, turn) for place, (_, turn) in enumerate(ready) if turn is not None]
    for number in range(TURNS):
        if number >= MIN_TURNS and time.monotonic() >= until_s:
            break
        for place, turn in racing[:: 1 if number % 2 == 0 else -1]:
            try:
                seconds[place].append(turn())
            except Exception as error:  # it held when it was checked; the others go on
                ready[place] = replace(ready[place][0], reason=reason_of(error)), None
                racing.remove((place, turn))
                seconds[place] = []
    found = zip(ready, seconds, strict=True)
    return [replace(entry, seconds=tuple(own), reason=None) if own else entry for (entry, _), own in found]


def get_ready(layer: Layer, tokens: int, clock: Clock) -> tuple[CrossoverEntry, Callable[[], float] | None]:
    """Check a layer and warm it up: its entry, and what runs a turn (seconds a pass and copy), None with a reason."""
    setting, bound = layer.work.setting, layer.contender.bound(tokens, layer.work.setting)
    entry = replace(layer.entry, tokens=tokens, error_bound=bound)
    try:
        entry = replace(entry, kernel=layer.contender.kernel(tokens, setting))
        error = layer_error(layer, tokens)
        entry = replace(entry, relative_error=error if math.isfinite(error) else None)
        if not error <= bound:  # NaN is over every bound
            return replace(entry, reason=f"wrong: off by {error:.2g} of the float32 product, allowed {bound:g}"), None
        work, mode = runnable(layer, tokens)
        passes = max(1, round(TURN_S / max(timed(work, 1, clock), 1e-7)))
        return replace(entry, mode=mode), lambda: timed(work, passes, clock) / (entry.copies or 1)
    except Exception as raised:  # a kernel that fails at this number of tokens
        return replace(entry, reason=reason_of(raised)), None


def layer_error(layer: Layer, tokens: int) -> float:
    """The largest |found - exact| / |exact| of a checked token's outputs, over one linear of each weight shape."""
    rows, errors = layer.work.rows[layer.work.rows < tokens], []
    for module, x, exact in layer.checks.values():
        difference = module(x[:, :tokens])[0][rows].float() - exact[: len(rows)]
        errors.append((difference.norm(dim=-1) / exact[: len(rows)].norm(dim=-1)).max())
    return float(torch.stack(errors).max())


def runnable(layer: Layer, tokens: int) -> tuple[Callable[[], object], Mode]:
    """One pass through all copies: a CUDA graph's replay where it can be captured, else the calls themselves."""
    calls = [(module, x[:, :tokens]) for module, x in layer.calls]

    def work() -> Tensor:
        for module, x in calls:
            out: Tensor = module(x)
        return out

    # At one token a fast GPU is done before Python has asked for the next kernel, and what would be timed is Python.
    if layer.work.setting.device.type == "cuda" and layer.contender.replayable:
        try:
            return captured(work, [x for _, x in layer.calls]), "CUDA graph"
        except RuntimeError:  # a kernel that cannot be captured is timed as it is; one that fails will fail again
            torch.cuda.synchronize()
    return work, "eager"


def captured(work: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """The work as a CUDA graph. Raises RuntimeError for one that does not hold all of it.

    A kernel that is launched on a stream of its own (some of autoawq's are) runs once, while the graph is recorded, and
    never again: with the inputs' sign turned, the outputs of a whole graph turn theirs.
    """
    from quantize.decoding.static import warm_up

    warm_up(work)
    expected = work().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    distinct = list({id(one): one for one in inputs}.values())
    for x in distinct:
        x.neg_()
    graph.replay()
    for x in distinct:
        x.neg_()
    if not (found + expected).norm() <= GRAPH_ERROR * expected.norm():
        raise RuntimeError("a CUDA graph does not hold all of this kernel")
    return graph.replay


def timed(work: Callable[[], object], passes: int, clock: Clock) -> float:
    """Seconds of one of so many passes."""
    clock.settle()
    start = clock.mark()
    for _ in range(passes):
        work()
    return clock.intervals_s([start, clock.mark()])[0] / passes
