"""A model's decoder layers apart: what they are called with, what their linear layers see, and what they hand on."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.methods.base import LayerInputs
from quantize.methods.routed import RoutedTokens
from quantize.model.apart import experts_of
from quantize.model.architecture import Architecture
from quantize.rounding.gram import StatsAccumulator, multiplies_bfloat16

Answer = Callable[[int, Tensor, dict[str, Any]], Tensor]
"""(layer number, its input, keywords of its call) -> what it gives instead of its output."""


LayerCall = dict[str, Any]
"""What a model calls a layer with besides its input, by keyword: masks and biases that fit one batch."""


@contextlib.contextmanager
def replace_layers(architecture: Architecture, answer: Answer, *, in_tuples: bool) -> Iterator[None]:
    """Have every decoder layer give what `answer` says, inside the block; in_tuples: in a tuple, as some models do."""

    def forward(index: int, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        given = dict(zip(names, args, strict=False)) | kwargs
        output = answer(index, given.pop(names[0]), given)
        return (output,) if in_tuples else output

    for index, layer in enumerate(architecture.layers):
        names = list(inspect.signature(layer.forward).parameters)
        layer.forward = partial(forward, index, names)
    try:
        yield
    finally:
        for layer in architecture.layers:
            del layer.forward


class _AllRecorded(Exception):  # noqa: N818 - it signals, it does not fail
    """The model has called its last layer: nothing after it is needed."""


@torch.no_grad()
def layer_calls(
    model: Any, architecture: Architecture, blocks: Tensor, *, in_tuples: bool = False
) -> list[tuple[Tensor, LayerCall]]:
    """What the model calls each decoder layer with for these token ids [n, t]: (input of the first, keywords).

    in_tuples: as `layers_give_tuples` says. Only the modules before the layers must hold weights; the recorded input is
    right for the first layer alone.
    """
    calls: list[tuple[Tensor, LayerCall]] = []

    def record(index: int, hidden: Tensor, kwargs: LayerCall) -> Tensor:
        calls.append((hidden, kwargs))
        if index == len(architecture.layers) - 1:
            raise _AllRecorded
        return hidden

    with replace_layers(architecture, record, in_tuples=in_tuples), contextlib.suppress(_AllRecorded):
        model(input_ids=blocks, use_cache=False)
    return calls


def layers_give_tuples(model: Any, architecture: Architecture, blocks: Tensor) -> bool:
    """Whether the model takes the first of what a layer gives: a tensor would lose its first dimension there."""
    try:
        inputs = [hidden for hidden, _ in layer_calls(model, architecture, blocks)]
    except (IndexError, ValueError, RuntimeError):
        return True
    return any(hidden.shape != inputs[0].shape for hidden in inputs)


def shared(value: Any, like: Any) -> Any:
    """`value`, its tensors those of `like` where they are equal: one copy for all batches, if they allow it."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        return like if value.shape == like.shape and torch.equal(value, like) else value
    if isinstance(value, tuple) and isinstance(like, tuple) and len(value) == len(like):
        return tuple(shared(one, other) for one, other in zip(value, like, strict=True))
    return value


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Sequence[Tensor], calls: Sequence[LayerCall]) -> Iterator[Tensor]:
    """The layer's output for each batch [b, t, hidden] with its call, one after the other.

    Matrix products run in bfloat16 where the hardware has them; what is between the products stays in float32.
    """
    device = next(layer.parameters()).device
    for batch, call in zip(hidden, calls, strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            output = layer(batch.to(device), **call)
        yield output[0] if isinstance(output, tuple) else output


def spilled(batch: Tensor, path: Path) -> Tensor:
    """A float32 copy of this batch that lives in a file: the system may drop its pages when memory is short."""
    kept = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=torch.float32).view(batch.shape)
    return kept.copy_(batch)


def is_spilled(batch: Tensor) -> bool:
    """Whether `spilled` made it."""
    return batch.untyped_storage().filename is not None


@torch.no_grad()
def observe_layer(
    architecture: Architecture, index: int, hidden: list[Tensor], calls: Sequence[LayerCall]
) -> LayerInputs:
    """Run decoder layer `index`, whose weights are loaded in float32, over the calibration text.

    hidden: the layer's input batches [b, t, hidden], replaced in place by its outputs; calls: what the model calls
    the layer with besides, for each batch. Raises UserError when an output is not finite.
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
    handles = [
        linear.register_forward_pre_hook(partial(observe, name))
        for name, linear in linears.items()
        if name not in inside
    ]
    handles += [
        layer.get_submodule(name).register_forward_pre_hook(block.record, with_kwargs=True)
        for name, block in blocks.items()
    ]
    for position, output in enumerate(run_layer(layer, hidden, calls)):
        if is_spilled(hidden[position]):
            hidden[position].copy_(output)
        else:
            hidden[position] = output
    for handle in handles:
        handle.remove()
    stats = {name: accumulator.finish() for name, accumulator in accumulators.items()}
    for name, linear in linears.items():  # one that the model never calls
        if name not in inside and name not in owners:
            owners[name] = name
            stats[name] = StatsAccumulator(linear.in_features, linear.weight.device).finish()
    sums = (*(batch.sum() for batch in hidden), *(one.gram.diagonal().sum() for one in stats.values()))
    if not all(bool(torch.isfinite(one)) for one in sums):  # NaN and Inf stay in a sum
        raise UserError(f"{prefix[:-1]} gives NaN or Inf on the calibration text: the source model is damaged")
    return LayerInputs(layer, prefix, linears, owners, stats, tuple(blocks.values()))
