"""AWQ one decoder layer at a time: from what its linear layers see, search and move scales, round, and judge it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantize.errors import UserError
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.methods.base import LayerInputs, half
from quantize.methods.quantized_run import QuantizedRun, put_weight
from quantize.methods.routed import RoutedTokens
from quantize.model.scales import Consumer, ScaleGroup, apply_scales
from quantize.process_memory import trim_memory
from quantize.rounding.awq_search import Reader, ScaleChoice, search_clip, search_scale, some_rows
from quantize.rounding.correction import Watched, round_rows
from quantize.rounding.gram import InputStats, row_errors
from quantize.rounding.options import AwqOptions

UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")  # as in autoawq: their outputs are multiplied with each other
WORSE_THAN_PLAIN = 1.1  # a layer's error over plain rounding's, at most: one of its groups may pay for the others
BATCH_TOKENS = 4096  # tokens that go through a layer at a time
FREED_SHARE = 0.2  # share of this process's memory that may lie freed but not given back while a layer is at work


@dataclass(frozen=True)
class LinearFacts:
    """What happened to one linear layer: relative output errors tr(D H D^T) / tr(W H W^T) on the calibration text, of
    `some_rows`.

    error:     of the weights as stored; error_rtn: of plain rounding to nearest.
    exponent:  the scale search's grid point, None where nothing was scaled.
    tokens:    of the calibration text that an expert's layer saw, None for all."""

    name: str
    error: float
    error_rtn: float
    exponent: float | None
    tokens: int | None = None


@dataclass(frozen=True)
class LayerResult:
    """One quantized decoder layer.

    weights: by full name (without ".weight").
    others:  every other tensor of the layer, scales applied, by full name.
    facts:   of each linear layer; seconds: a phase.
    before:  by variant, what its method made of the layer before its scales moved, by full name."""

    index: int
    weights: dict[str, Int4Weight]
    others: dict[str, Tensor]
    facts: tuple[LinearFacts, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    before: dict[str, dict[str, Tensor]] = field(default_factory=dict)


Groups = tuple[ScaleGroup, ...]  # where the scales of a layer may move
SEARCHED = ""  # in place of a variant's name: those that share the search
Makers = Mapping[str, Callable[[LayerInputs, QuantizedRun | None], dict[str, Tensor]]]  # of LayerResult.before


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add what the block takes, in wall-clock seconds, to its phase."""
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


@torch.no_grad()
def quantize_layer(
    index: int,
    seen: LayerInputs,
    options: AwqOptions | None,
    groups: Groups,
    before: Makers,
    runs: Mapping[str, QuantizedRun],
    seconds: dict[str, float],
) -> LayerResult:
    """Quantize decoder layer `index`, which is left scaled. Raises UserError where it comes out too bad.

    runs: by variant, how its quantized model sees the layer, SEARCHED for the one of `options`; they go through it.
    seconds: of the phases before this. With no options nothing is quantized here: only `before` sees the layer."""
    made = {}
    for variant, make in before.items():
        with timed(seconds, "other variants"):
            made[variant] = make(seen, runs.get(variant))
            if run := runs.get(variant):
                run.finish()
                run.restore()
    if options is None:
        return LayerResult(index, {}, {}, (), seconds, made)
    run = runs.get(SEARCHED)
    work, groups = _Work(seen, options, run), groups if options.search else ()
    with timed(seconds, "scale"):
        work.scale(groups)
        seen.stats.update({owner: replace(stats) for owner, stats in seen.stats.items()})  # less what it kept
    with timed(seconds, "round"):
        for owner in list(seen.stats):
            trim_memory(above=FREED_SHARE)
            work.round_owner(owner)
        for block in seen.blocks:
            for number in range(len(block.experts)):
                trim_memory(above=FREED_SHARE)
                work.quantize_expert(block, number, groups)
        if run:
            run.finish()
    error, plain = sum(work.errors.values()), sum(work.plain_errors.values())
    if not error <= WORSE_THAN_PLAIN * plain:  # or is not finite
        worse = f"worse than plain rounding on the calibration text (relative error {error:.3g}, plain {plain:.3g})"
        advice = "use more --blocks or other --calibration text, or the variant rtn"
        raise UserError(f"{seen.prefix[:-1]} comes out {worse}: {advice}")
    full = {seen.prefix + name: weight for name, weight in work.weights.items()}
    return LayerResult(index, full, seen.others(), work.facts(), seconds, made)


class _Work:
    """One layer on its way: what has been searched, rounded and found so far, by the linears' names inside it."""

    def __init__(self, seen: LayerInputs, options: AwqOptions, run: QuantizedRun | None = None) -> None:
        self._seen = seen
        self._run = run
        self._scales: dict[str, Tensor] = {}  # by which owners' inputs are divided
        self._options = options
        self.weights: dict[str, Int4Weight] = {}
        self.errors: dict[str, float] = {}
        self.plain_errors: dict[str, float] = {}
        self._exponents: dict[str, float | None] = {}
        self._tokens: dict[str, int] = {}
        self._moved: dict[str, Tensor] = {}  # scales in the columns of experts' layers
        self._outputs: dict[str, float] = {}
        for owner, stats in seen.stats.items():
            self._outputs |= {name: self._output_square(name, stats) for name in seen.sharing(owner)}

    def facts(self) -> tuple[LinearFacts, ...]:
        """Of every linear that was rounded, in the order of the layer."""
        prefix, kept = self._seen.prefix, (self.errors, self.plain_errors, self._exponents, self._tokens)
        rounded = [name for name in self._seen.linears if name in self.errors]
        return tuple(LinearFacts(prefix + name, *(of.get(name) for of in kept)) for name in rounded)  # type: ignore

    def scale(self, groups: Sequence[ScaleGroup]) -> None:
        """Search and apply the scales of one group after the other, those inside experts aside.

        Moving them leaves every layer's output as it was. Before, each linear gets its error of plain rounding."""
        seen = self._seen
        for owner, stats in seen.stats.items():
            self._note_plain(seen.sharing(owner), stats)
        for group in groups:
            if any(group.source.startswith(f"{block.name}.") for block in seen.blocks):
                continue
            trim_memory(above=FREED_SHARE)
            channels = {seen.owners[one.name]: one.channels for one in group.consumers if one.name in seen.owners}
            names = [seen.sharing(owner) for owner in channels]
            readers = {}
            for owner, sharing in zip(channels, names, strict=True):
                rows, stats = torch.cat([seen.linears[name].weight.data for name in sharing]), seen.stats[owner]
                readers[owner] = Reader(rows, stats, torch.tensor(channels[owner], device=stats.abs_mean.device))
            read = {}
            for block in seen.blocks:
                if own := [one for one in group.consumers if one.name.startswith(f"{block.name}.")]:
                    read[block] = own
            experts = [reader for block, own in read.items() for reader in self._readers(own, block, names)]
            if not readers and not experts:
                continue
            choice = self._search([*readers.values(), *experts], group, names)
            if choice.exponent is None:
                continue
            for owner, reader in readers.items():
                seen.stats[owner] = seen.stats[owner].scaled(by := reader.spread(choice.scales))
                self._scales[owner] = by * self._scales.get(owner, 1)
            for block, own in read.items():
                block.scale(own[0].spread(choice.scales))
                self._moved |= {one.name: one.spread(choice.scales) for one in own}
            if group.source in self._outputs:  # the scales are in its output now
                stats = seen.stats[seen.owners[group.source]]
                self._outputs[group.source] = self._output_square(group.source, stats)

    def quantize_expert(self, block: RoutedTokens, number: int, groups: Sequence[ScaleGroup]) -> None:
        """Scale one expert's middle, and round its layers by what it saw."""
        home = f"{block.name}.{number}."
        names = [name for name in self._seen.linears if name.startswith(home)]
        inner = f"{home}down_proj"
        outer, inners = [name for name in names if name != inner], [name for name in names if name == inner]
        stats, inner_stats = block.expert_stats(number)
        self._tokens |= dict.fromkeys(names, block.tokens()[number])
        for own, found in ((outer, stats), (inners, inner_stats)):
            self._outputs |= {name: self._output_square(name, found) for name in own}
            self._note_plain(own, found)
        for group in groups:
            if group.source.startswith(home) and inners:
                channels = torch.tensor(group.consumers[0].channels, device=inner_stats.abs_mean.device)
                reader = Reader(self._seen.linears[inner].weight.data, inner_stats, channels)
                choice = self._search([reader], group, [[inner]])
                if choice.exponent is not None:
                    inner_stats = inner_stats.scaled(reader.spread(choice.scales))
                    if group.source in self._outputs:
                        self._outputs[group.source] = self._output_square(group.source, stats)
        self.round(outer, stats)
        self.round(inners, inner_stats)

    def round_owner(self, owner: str) -> None:
        """Round the linears that share this input, on what the quantized model gives them where that can be told."""
        names, run = self._seen.sharing(owner), self._run
        weights = [self._seen.linears[name].weight.data for name in names]
        found = run.inputs(owner, weights, self._scales.get(owner)) if run else None
        stats = self._seen.stats.pop(owner) if found else self._seen.stats[owner]  # its memory is needed
        self.round(names, *(found or (stats, None)))

    def round(self, names: Sequence[str], stats: InputStats, watched: Watched | None = None) -> None:
        """Round the weights of linears that share one input, all their rows at once, and give them to the layer."""
        if not names:
            return
        linears, options = self._seen.linears, self._options
        own = [linears[name].weight.data for name in names]
        rows = torch.cat(own) if len(own) > 1 else own[0]
        clips = [_clip(name, linears[name].weight.data, stats, options.group_size) for name in names if options.clip]
        clip = torch.cat(clips) if clips else None
        quantized = round_rows(rows, stats, options, clip, watched)
        sizes = [linears[name].out_features for name in names]
        parts = (torch.split(one, sizes) for one in (quantized.codes, quantized.scales, quantized.zeros))
        self.weights |= {name: Int4Weight(*part) for name, *part in zip(names, *parts, strict=True)}
        put = self._run.put if self._run else lambda name, weight: put_weight(linears[name], weight)
        for name in names:
            values, weight = self.weights[name].dequantize(), linears[name].weight.data
            change = some_rows(values) - some_rows(weight)
            self.errors[name] = float(row_errors(change, stats.gram).sum()) / self._outputs[name]
            put(name, values)

    def _search(self, readers: Sequence[Reader], group: ScaleGroup, names: Sequence[Sequence[str]]) -> ScaleChoice:
        """Search one group's scales and apply them; names: the linears of each reader."""
        free = torch.tensor(group.free, device=readers[0].weight.device)
        choice = search_scale(readers, self._options.group_size, free)
        if choice.exponent is not None:
            apply_scales(self._seen.layer, group, choice.scales)
        self._exponents |= dict.fromkeys((name for own in names for name in own), choice.exponent)
        return choice

    def _readers(self, consumers: Sequence[Consumer], block: RoutedTokens, names: list[list[str]]) -> list[Reader]:
        """Readers of these layers of a block's experts; their names are added. All take the statistics of the block's
        input, weighted by the tokens that each saw: one that saw few has none of its own that a search could trust."""
        stats, tokens, readers = block.stats(), block.tokens(), []
        for consumer in consumers:
            if consumer.name in self._seen.linears:
                number = int(consumer.name.removeprefix(f"{block.name}.").split(".")[0])
                weight = self._seen.linears[consumer.name].weight.data
                share = tokens[number] / max(1, sum(tokens))
                channels = torch.tensor(consumer.channels, device=weight.device)
                readers.append(Reader(weight, stats, channels, share))
                names.append([consumer.name])
        return readers

    def _note_plain(self, names: Sequence[str], stats: InputStats) -> None:
        """The relative errors of rounding these linears to nearest."""
        for name in names:
            weight = some_rows(whole := self._seen.linears[name].weight.data)
            half(f"{self._seen.prefix}{name}.weight", whole.norm(torch.inf, dim=-1), torch.float16)
            moved = self._moved.get(name, weight.new_ones(1))
            plain = round_to_nearest(weight / moved, self._options.group_size).dequantize().mul_(moved)
            error = float(row_errors(plain.sub_(weight), stats.gram_lowp).sum())
            self.plain_errors[name] = error / self._outputs[name]

    def _output_square(self, name: str, stats: InputStats) -> float:
        """tr(W H W^T), the mean squared norm of the linear layer's output; never zero."""
        rows = row_errors(some_rows(self._seen.linears[name].weight.data), stats.gram_lowp)
        return max(float(rows.sum()), torch.finfo(torch.float32).tiny)


def _clip(name: str, weight: Tensor, stats: InputStats, group_size: int) -> Tensor:
    """The magnitudes [out, groups] to clip at; infinity where autoawq clips nothing."""
    if any(key in name for key in UNCLIPPED):
        return weight.new_full((weight.shape[0], weight.shape[1] // group_size), torch.inf)
    return search_clip(weight, stats, group_size)
