"""Layers fed from files: the model stays on the meta device and its layers pass through memory in turn."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.building.layer import BATCH_TOKENS, SEARCHED, Groups, LayerResult, Makers, quantize_layer, timed
from quantize.errors import UserError
from quantize.methods.base import LayerInputs
from quantize.methods.quantized_run import QuantizedRun, replace_batch, run_layer, spilled
from quantize.methods.routed import RoutedTokens
from quantize.model.apart import experts_of
from quantize.model.architecture import Architecture
from quantize.model.groups import WRAPPED_TYPES, Prober, tensors_in
from quantize.model.layer_calls import LayerCall, layer_calls, replace_layers, shared, structure
from quantize.model.skeleton import Skeleton, empty
from quantize.process_memory import trim_memory
from quantize.rounding.gram import StatsAccumulator, product_dtype
from quantize.rounding.options import AwqOptions
from quantize.weights import check_finite

PROBED_TOKENS = 64  # of a block, to find where scales may move
WATCHED_EVERY, FEWEST_TO_WATCH = 12, 4  # of the calibration blocks one is watched, but of fewer none
JUMP = 2.0  # perplexity ratio from which on a checkpoint is broken, not quantized


@dataclass(frozen=True)
class HeldOutResult:
    """What `tokens` predicted held-out tokens showed; divergence: mean KL(source || quantized) in nats a token."""

    perplexity_source: float
    perplexity: float
    divergence: float
    tokens: int

    def check(self) -> None:
        """Raise UserError when the quantized model has lost what the source knows."""
        if not self.perplexity / self.perplexity_source <= JUMP:  # or is not finite
            found = f"perplexity {self.perplexity:.4g} on held-out text, the source has {self.perplexity_source:.4g}"
            advice = "use more --blocks or other --calibration text, or a bnb variant"
            raise UserError(f"the quantized model is broken: {found}; {advice}")


@dataclass
class LayerStream:
    """Goes through the decoder layers of a model whose weights are in files, quantizing each.

    skeleton:     holds the transformers model, its weights on the meta device but for the layer at work on `device`.
    groups:       where scales may move, for each kind of layer that was tried; kinds: of each layer that was seen.
    states:       the inputs of the layer after the one yielded last, [batch, tokens, hidden] each: of the calibration's
                  batches in the source and in each quantized model, the held-out text in both, and the first block."""

    skeleton: Skeleton
    architecture: Architecture
    device: torch.device
    groups: dict[str, Groups] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)

    def quantized(
        self,
        blocks: Tensor,
        options: AwqOptions | None,
        *,
        start: int = 0,
        states: Sequence[Tensor] = (),
        before: Makers | None = None,
        held_out: Tensor | None = None,
        spill: Path | None = None,
    ) -> Iterator[tuple[LayerResult, list[Tensor]]]:
        """Yield each decoder layer from `start` on, quantized, with the inputs of the layer after it: `self.states`.

        blocks:   calibration token ids, int64 [blocks, block_tokens].
        states:   the inputs of layer `start` as an earlier run yielded them; none, and they are computed.
        before:   by variant, called with each layer before its scales move.
        held_out: token ids of text to run along, int64 [n, block_tokens], once `options` quantize something.
        spill:    a folder for files that hold the batches' inputs in place of memory.

        A layer's weights, and its inputs, are freed when the next one is asked for."""
        self.skeleton.fill_outer(self.architecture.layers_name, self.device)
        makers, runs = before or {}, [*(before or {})]
        if options and options.rounding == "gptq":
            runs.append(SEARCHED)
        calibrated, watched = apart(blocks) if runs else (blocks, blocks[:0])
        runs = runs if len(watched) else []
        batches = list(torch.split(calibrated, max(1, BATCH_TOKENS // blocks.shape[1])))
        batches += [watched] if runs else []
        judged = [] if held_out is None else [held_out, held_out]
        sizes = [len(batches)] * (1 + len(runs)) + [len(judged)]
        routed = any(experts_of(module) for module in self.skeleton.model.modules())  # which few tokens do not reach
        probe = blocks[:1] if routed else blocks[:1, :PROBED_TOKENS]
        first, calls = self._record_all([*batches * (1 + len(runs)), *judged, probe])
        *hidden, probed = (batch.to(self.device) for batch in states or first)
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)
            for number in range(len(hidden) - len(judged)):
                hidden[number] = spilled(hidden[number], spill / f"{number:06d}.bin")
        source, *quantized, judged = _parted(hidden, sizes)
        self.states = [*hidden, probed]
        del states, first, hidden
        for module in self.skeleton.model.modules():  # their outputs are there; buffers that no file holds stay
            if isinstance(module, nn.Embedding):
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        for index in range(start, len(self.architecture.layers)):
            layer, prefix = self.architecture.layers[index], self.architecture.prefix(index)
            self.skeleton.fill(layer, prefix, self.device)
            self.skeleton.forget_stacks()
            self.states.clear()
            *of_batches, of_probe = [each[index] for each in calls]
            of_source, *of_runs, of_judged = _parted(of_batches, sizes)
            seconds: dict[str, float] = {}
            with timed(seconds, "probe"):
                groups = self._groups(index, probed, of_probe) if options and options.search else ()
            (probed,) = run_layer(layer, [probed], [of_probe])
            judged[:1] = run_layer(layer, judged[:1], of_judged[:1])  # as the source has the layer
            with timed(seconds, "forward"):
                seen = observe_layer(
                    self.architecture, index, source, of_source, self.skeleton.stored, watch=bool(runs), spill=spill
                )
            own = zip(runs, quantized, of_runs, strict=True)
            parts = layer, seen.linears
            through = {run: QuantizedRun(*parts, one, call, seen.exact, run == runs[-1]) for run, one, call in own}
            result = quantize_layer(index, seen, options, groups, makers, through, seconds)
            del seen, through  # and the weights as they were
            judged[1:] = run_layer(layer, judged[1:], of_judged[1:])  # scaled, with its quantized weights
            self.states += [*source, *(batch for own in quantized for batch in own), *judged, probed]
            yield result, self.states
            empty(layer)
            trim_memory()

    def _groups(self, index: int, hidden: Tensor, call: LayerCall) -> Groups:
        """Where the scales of this layer may move, tried once for each kind of layer."""
        layer, config = self.architecture.layers[index], self.skeleton.model.config.get_text_config(decoder=True)
        kind = f"{sorted(call)} {structure(layer)}"
        self.kinds[index] = kind
        if kind not in self.groups:

            def run() -> list[Tensor]:
                given = {key: dict(value) if isinstance(value, dict) else value for key, value in call.items()}
                return tensors_in([layer(hidden.clone(), **given), [v for v in given.values() if isinstance(v, dict)]])

            stated = vars(config)  # some configs refuse what may differ between layers
            heads = stated.get("num_attention_heads")
            sizes = [stated.get(key) for key in ("v_head_dim", "head_dim", "global_head_dim")]
            sizes.append(config.hidden_size // heads if heads else None)
            found, _ = Prober(layer, run).groups([one for one in sizes if one], config.model_type in WRAPPED_TYPES)
            self.groups[kind] = tuple(found)
        return self.groups[kind]

    def _record_all(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[LayerCall]]]:
        """For each batch the input of the first layer, and what each layer is called with besides."""
        hidden, calls = [], []
        of_size: dict[int, list[LayerCall]] = {}
        for batch in batches:
            recorded = layer_calls(self.skeleton.model, self.architecture, batch.to(self.device))
            like = of_size.setdefault(len(batch), [call for _, call in recorded])
            pairs = zip((call for _, call in recorded), like, strict=True)
            calls.append([{key: shared(value, other.get(key)) for key, value in own.items()} for own, other in pairs])
            hidden.append(recorded[0][0])
        return hidden, calls

    @torch.no_grad()
    def judge(self, held_out: Tensor) -> HeldOutResult:
        """Compare what source and quantized model predict of held-out token ids, after the last layer."""
        model = self.skeleton.model
        self.skeleton.fill_outer(self.architecture.layers_name, self.device)
        head = model.get_output_embeddings()
        names = {module: name for name, module in model.named_modules()}
        self.skeleton.fill(head, f"{names[head]}.", self.device, recurse=False)
        model.tie_weights()

        def log_probabilities(ids: Tensor, last: Tensor) -> Tensor:
            """Of the next token at every position but the last, float32 [t - 1, vocabulary]."""
            with replace_layers(self.architecture, lambda *_: last):
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            return torch.log_softmax(logits.float(), dim=-1)

        losses, divergence, tokens = [0.0, 0.0], 0.0, 0
        states = self.states[-3:-1]
        apart = [torch.split(state, 1, dim=state.dim() - 3) for state in states]  # some stack streams before the batch
        for ids, *ends in zip(held_out.to(self.device), *apart, strict=True):
            exact, other = (log_probabilities(ids, last) for last in ends)
            for row, predicted in enumerate((exact, other)):
                losses[row] -= float(predicted.gather(1, ids[1:, None]).double().sum())
            divergence += float((exact.exp() * (exact - other)).sum().double())
            tokens += len(ids) - 1
        source, quantized = (torch.tensor(losses, dtype=torch.float64) / tokens).exp().tolist()
        return HeldOutResult(source, quantized, divergence / tokens, tokens)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor outside the decoder layers, one after the other, by its name in the files."""
        for file_name, home in self.skeleton.files.homes.items():
            if not home.startswith(f"{self.architecture.layers_name}.") or home not in self.skeleton.files.known:
                tensor = self.skeleton.weights.get(file_name)
                check_finite(file_name, tensor)
                yield file_name, tensor


@torch.no_grad()
def observe_layer(
    architecture: Architecture,
    index: int,
    hidden: list[Tensor],
    calls: Sequence[LayerCall],
    stored: Mapping[str, str],
    *,
    watch: bool = False,
    spill: Path | None = None,
) -> LayerInputs:
    """Run decoder layer `index`, whose weights are loaded in float32, over the calibration text.

    hidden: the layer's input batches [b, t, hidden], replaced in place by its outputs; calls: what the model calls
    the layer with besides, for each batch; stored: as LayerInputs'; watch: whether the last batch is watched, not
    calibrated on, and what the linear layers see is kept; spill: a folder to keep it in.
    Raises UserError when an output is not finite."""
    layer, linears, prefix = architecture.layers[index], architecture.linears(index), architecture.prefix(index)
    owners: dict[str, str] = {}
    accumulators: dict[str, StatsAccumulator] = {}
    exact: dict[str, list[Tensor]] = {}
    last: tuple[Tensor | None, str] = (None, "")
    at, calibrated = 0, len(hidden) - watch

    def observe(name: str, linear: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        inputs: Tensor = args[0]
        owner = owners.setdefault(name, last[1] if inputs is last[0] else name)
        if owner == name:
            if name not in accumulators:
                accumulators[name] = StatsAccumulator(inputs.shape[-1], inputs.device)
            if at < calibrated:
                accumulators[name].add(inputs)
            if watch and len(kept := exact.setdefault(name, [])) == at:
                tokens = inputs.reshape(-1, inputs.shape[-1]).to(product_dtype(inputs.device))
                kept.append(spilled(tokens, spill / f"{name}-{at:06d}.bin") if spill else tokens)
        last = inputs, owner

    blocks = {name: RoutedTokens(name, module) for name, module in layer.named_modules() if experts_of(module)}
    of_experts = tuple(f"{name}." for name in blocks)
    others = {name: linear for name, linear in linears.items() if not name.startswith(of_experts)}
    with contextlib.ExitStack() as hooks:
        for name, linear in others.items():
            hooks.enter_context(linear.register_forward_pre_hook(partial(observe, name)))
        with contextlib.ExitStack() as routed:
            for name, block in blocks.items():
                module = layer.get_submodule(name)
                routed.enter_context(module.register_forward_pre_hook(block.record, with_kwargs=True))
            for at in range(calibrated):
                replace_batch(hidden, at, *run_layer(layer, hidden[at : at + 1], calls[at : at + 1]))
        for at in range(calibrated, len(hidden)):
            replace_batch(hidden, at, *run_layer(layer, hidden[at:], calls[at:]))
    stats = {name: accumulator.finish() for name, accumulator in accumulators.items()}
    for name, linear in others.items():  # one that the model never calls
        if name not in owners:
            owners[name] = name
            stats[name] = StatsAccumulator(linear.in_features, linear.weight.device).finish()
    sums = (*(batch.sum() for batch in hidden), *(one.gram.diagonal().sum() for one in stats.values()))
    if not all(bool(torch.isfinite(one)) for one in sums):  # NaN and Inf stay in a sum
        raise UserError(f"{prefix[:-1]} gives NaN or Inf on the calibration text: the source model is damaged")
    whole = {name: kept for name, kept in exact.items() if len(kept) == len(hidden)}
    return LayerInputs(layer, prefix, linears, owners, stats, tuple(blocks.values()), stored, whole)


def apart(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks to calibrate on, and those to watch."""
    count = len(blocks) // WATCHED_EVERY or int(len(blocks) >= FEWEST_TO_WATCH)
    watched = torch.zeros(len(blocks), dtype=torch.bool)
    if count:
        watched[len(blocks) // count - 1 :: len(blocks) // count] = True
    return blocks[~watched], blocks[watched]


def _parted(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """The items in lists of these sizes, one after the other."""
    rest = iter(items)
    return [list(itertools.islice(rest, size)) for size in sizes]


@contextlib.contextmanager
def tensor_core_products(device: torch.device) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in TF32 inside the block: ten bits of mantissa choose the same scales."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
