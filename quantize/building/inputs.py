"""A decoder layer at work: what its linear layers see of the calibration text, and what it hands on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.methods.base import LayerInputs
from quantize.methods.routed import RoutedTokens
from quantize.model.apart import experts_of
from quantize.model.architecture import Architecture
from quantize.model.layer_calls import LayerCall, one_layer
from quantize.rounding.gram import StatsAccumulator, multiplies_bfloat16


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Sequence[Tensor], calls: Sequence[LayerCall]) -> Iterator[Tensor]:
    """The layer's output for each batch [b, t, hidden] with its call, one after the other.

    Matrix products run in bfloat16 where the hardware has them; what is between the products stays in float32.
    """
    device = next(layer.parameters()).device
    for batch, call in zip(hidden, calls, strict=True):
        with one_layer(layer), torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            output = layer(batch.to(device), **call)
        yield output[0] if isinstance(output, tuple) else output


def spilled(batch: Tensor, path: Path) -> Tensor:
    """A float32 copy of this batch that lives in a file: the system may drop its pages when memory is short."""
    kept = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=torch.float32).view(batch.shape)
    return kept.copy_(batch)


def is_spilled(batch: Tensor) -> bool:
    return batch.untyped_storage().filename is not None


@torch.no_grad()
def observe_layer(
    architecture: Architecture,
    index: int,
    hidden: list[Tensor],
    calls: Sequence[LayerCall],
    stored: Mapping[str, str] = MappingProxyType({}),
) -> LayerInputs:
    """Run decoder layer `index`, whose weights are loaded in float32, over the calibration text.

    hidden: the layer's input batches [b, t, hidden], replaced in place by its outputs; calls: what the model calls
    the layer with besides, for each batch; stored: as LayerInputs'. Raises UserError when an output is not finite.
    """
    layer, linears, prefix = architecture.layers[index], architecture.linears(index), architecture.prefix(index)
    owners: dict[str, str] = {}
    accumulators: dict[str, StatsAccumulator] = {}
    last: tuple[Tensor | None, str] = (None, "")

    def observe(name: str, linear: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        inputs: Tensor = args[0]
        owner = owners.setdefault(name, last[1] if inputs is last[0] else name)
        if owner == name:
            if name not in accumulators:
                accumulators[name] = StatsAccumulator(inputs.shape[-1], inputs.device)
            accumulators[name].add(inputs)
        last = inputs, owner

    blocks = {name: RoutedTokens(name, module) for name, module in layer.named_modules() if experts_of(module)}
    inside = {f"{name}.{key}" for name in blocks for key, _ in layer.get_submodule(name).named_modules()}
    with ExitStack() as hooks:
        for name, linear in linears.items():
            if name not in inside:
                hooks.enter_context(linear.register_forward_pre_hook(partial(observe, name)))
        for name, block in blocks.items():
            module = layer.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(block.record, with_kwargs=True))
        for position, output in enumerate(run_layer(layer, hidden, calls)):
            hidden[position] = hidden[position].copy_(output) if is_spilled(hidden[position]) else output
    stats = {name: accumulator.finish() for name, accumulator in accumulators.items()}
    for name, linear in linears.items():  # one that the model never calls
        if name not in inside and name not in owners:
            owners[name] = name
            stats[name] = StatsAccumulator(linear.in_features, linear.weight.device).finish()
    sums = (*(batch.sum() for batch in hidden), *(one.gram.diagonal().sum() for one in stats.values()))
    if not all(bool(torch.isfinite(one)) for one in sums):  # NaN and Inf stay in a sum
        raise UserError(f"{prefix[:-1]} gives NaN or Inf on the calibration text: the source model is damaged")
    return LayerInputs(layer, prefix, linears, owners, stats, tuple(blocks.values()), stored)
