"""AWQ one decoder layer at a time: read it, watch its inputs, search, round, hand it on, free it.

Memory holds one layer's weights, its Gram matrices and the activations between two layers, however many layers the
model has.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantize.building.inputs import LayerCall, observe_layer
from quantize.errors import UserError
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.methods.base import LayerInputs
from quantize.model.architecture import Architecture, ScaleGroup, apply_scales
from quantize.process_memory import trim_memory
from quantize.rounding.awq_search import search_clip, search_scale
from quantize.rounding.gptq import refit_scales, round_with_feedback
from quantize.rounding.gram import InputStats, row_errors
from quantize.rounding.options import AwqOptions

UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")
"""Linear layers whose weights are not clipped, as in autoawq: their outputs are multiplied with each other."""

WORSE_THAN_PLAIN = 1.1
"""How much larger than plain rounding's the error of a whole layer may come out: the search looks at groups of
linear layers, and one of them may pay for the others."""

BATCH_TOKENS = 4096
"""Tokens that go through a layer at a time."""

FREED_SHARE = 0.2
"""Share of this process's memory that may lie freed but not given back while a layer is at work."""


@dataclass(frozen=True)
class LinearFacts:
    """What happened to one linear layer: relative output errors tr(D H D^T) / tr(W H W^T) on the calibration text.

    name:      of the linear layer in the model.
    error:     of the weights as stored.
    error_rtn: of plain rounding to nearest.
    exponent:  the scale search's grid point, None where nothing was scaled.
    """

    name: str
    error: float
    error_rtn: float
    exponent: float | None


@dataclass(frozen=True)
class LayerResult:
    """One quantized decoder layer.

    index:   of the layer.
    weights: by full name (without ".weight").
    others:  every other tensor of the layer, scales applied, by full name.
    facts:   of each linear layer.
    seconds: a phase.
    before:  by variant, what its method made of the layer before its scales moved, by full name.
    """

    index: int
    weights: dict[str, Int4Weight]
    others: dict[str, Tensor]
    facts: tuple[LinearFacts, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    before: dict[str, dict[str, Tensor]] = field(default_factory=dict)


FromInputs = Callable[[LayerInputs], dict[str, Tensor]]
"""What another method makes of a layer before its scales move; its tensors come back in the result."""


@torch.no_grad()
def quantize_layer(
    architecture: Architecture,
    index: int,
    hidden: list[Tensor],
    call: LayerCall,
    options: AwqOptions | None,
    before: Mapping[str, FromInputs] | None = None,
) -> LayerResult:
    """Quantize decoder layer `index`; arguments and errors as observe_layer's. The layer is left scaled.

    With no options nothing is quantized here: only `before` sees the layer.
    """
    started = time.perf_counter()
    seen = observe_layer(architecture, index, hidden, call)
    seconds = {"forward": time.perf_counter() - started}
    started = time.perf_counter()
    made = {variant: make(seen) for variant, make in (before or {}).items()}
    if made:
        seconds["other variants"] = time.perf_counter() - started
    if options is None:
        return LayerResult(index, {}, {}, (), seconds, made)

    started = time.perf_counter()
    groups = architecture.scale_groups(index) if options.search else []
    outputs, plain_errors, exponents = _scale_layer(seen, groups, options)
    seconds["scale"] = time.perf_counter() - started

    started = time.perf_counter()
    weights: dict[str, Int4Weight] = {}
    for owner in seen.stats:
        trim_memory(above=FREED_SHARE)
        weights |= _round(seen, owner, options)
    errors = {name: _noise(weights[name], seen, name) / outputs[name] for name in seen.linears}
    seconds["round"] = time.perf_counter() - started
    error, plain = sum(errors.values()), sum(plain_errors.values())
    if not error <= WORSE_THAN_PLAIN * plain:  # or is not finite
        raise UserError(
            f"{seen.prefix[:-1]} comes out worse than plain rounding on the calibration text (relative error "
            f"{error:.3g}, plain {plain:.3g}): use more --blocks or other --calibration text, or the variant rtn"
        )
    facts = tuple(
        LinearFacts(seen.prefix + name, errors[name], plain_errors[name], exponents.get(name)) for name in errors
    )
    full = {seen.prefix + name: weight for name, weight in weights.items()}
    return LayerResult(index, full, seen.others(), facts, seconds, made)


def _round(seen: LayerInputs, owner: str, options: AwqOptions) -> dict[str, Int4Weight]:
    """Round the weights of the layers that share one input, all their rows at once."""
    linears, stats, names = seen.linears, seen.stats[owner], seen.sharing(owner)
    rows = torch.cat([linears[name].weight.data for name in names])
    clip = None
    if options.clip:
        clip = torch.cat([_clip(name, linears[name].weight.data, stats, options.group_size) for name in names])
    gram = stats.shrunk()
    if options.rounding == "gptq":
        quantized = round_with_feedback(rows, gram, options.group_size, clip)
    else:
        quantized = round_to_nearest(rows, options.group_size, clip)
    if options.refit:
        quantized = refit_scales(quantized, rows, gram)
    sizes = [linears[name].out_features for name in names]
    parts = (torch.split(one, sizes) for one in (quantized.codes, quantized.scales, quantized.zeros))
    return {name: Int4Weight(*part) for name, *part in zip(names, *parts, strict=True)}


def _clip(name: str, weight: Tensor, stats: InputStats, group_size: int) -> Tensor:
    """The magnitudes [out, groups] to clip at; infinity where autoawq clips nothing."""
    if any(key in name for key in UNCLIPPED):
        return weight.new_full((weight.shape[0], weight.shape[1] // group_size), torch.inf)
    return search_clip(weight, stats, group_size)


def _output_square(seen: LayerInputs, name: str) -> float:
    """tr(W H W^T), the mean squared norm of the linear layer's output; never zero."""
    rows = row_errors(seen.linears[name].weight.data, seen.stats[seen.owners[name]].gram_lowp)
    return max(float(rows.sum()), torch.finfo(torch.float32).tiny)


def _noise(quantized: Int4Weight, seen: LayerInputs, name: str) -> float:
    """tr(D H D^T) with D the change of the weight: the mean squared norm of the change of the layer's output."""
    change = quantized.dequantize().sub_(seen.linears[name].weight.data)
    return float(row_errors(change, seen.stats[seen.owners[name]].gram_lowp).sum())


def _scale_layer(
    seen: LayerInputs, groups: Sequence[ScaleGroup], options: AwqOptions
) -> tuple[dict[str, float], dict[str, float], dict[str, float | None]]:
    """Search and apply the scales of one group after the other; moving them leaves every layer's output as it was.

    Returns by name of the linear: the mean squared norms of the outputs afterwards, the relative errors of plain
    rounding of the weights as they came, and the exponents of the grid.
    """
    outputs = {name: _output_square(seen, name) for name in seen.linears}
    searched = {name for group in groups for name in group.linears}
    errors = {
        name: _noise(round_to_nearest(linear.weight.data, options.group_size), seen, name) / outputs[name]
        for name, linear in seen.linears.items()
        if name not in searched
    }
    exponents: dict[str, float | None] = {}
    for group in groups:
        trim_memory(above=FREED_SHARE)
        owner, linears = seen.owners[group.linears[0]], [seen.linears[name] for name in group.linears]
        choice = search_scale(torch.cat([one.weight.data for one in linears]), seen.stats[owner], options.group_size)
        if choice.exponent is not None:
            apply_scales(seen.layer, group, choice.scales)
            seen.stats[owner] = seen.stats[owner].scaled(choice.scales)
        exponents |= dict.fromkeys(group.linears, choice.exponent)
        rows = torch.split(choice.unscaled_rows, [linear.out_features for linear in linears])
        errors |= {name: float(own.sum()) / outputs[name] for name, own in zip(group.linears, rows, strict=True)}
        if group.previous in seen.linears:  # the scales are in its output now
            outputs[group.previous] = _output_square(seen, group.previous)
    return outputs, errors, exponents
