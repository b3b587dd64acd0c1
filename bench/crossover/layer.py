"""One decoder layer's linear layers, built for a contender of `bench.crossover`, checked and made ready to be timed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.crossover.contenders import CannotRun, Contender, Setting
from bench.records.crossover import CrossoverEntry, Mode
from quantize.dummy import DummyWeights, dummy_config, write_dummy_folder
from quantize.errors import UserError
from quantize.loading.device_map import weights_bytes
from quantize.source import cache_folder

CACHE_MULTIPLE = 2
"""On a GPU the passes go through copies of the layer that hold so many times the L2 cache together: in a model, a
layer's weights have left the cache by the time the next token asks for them."""

MAX_COPIES = 64
"""A layer so small that this is not enough stays in the cache."""

Linear = tuple[str, int, int]
"""Name, out features, in features."""


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
                built = contender.build(drawn.get(f"{name} {len(copies)}").float(), setting)
                modules.append(built.module.eval())
                if not copies and shape not in [list(entry.linears[known][1:]) for known in expected]:
                    expected[place] = inputs.x[shape[1]][0][inputs.rows].float() @ built.exact.t()
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
