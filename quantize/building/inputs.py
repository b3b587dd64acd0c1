"""A model's decoder layers apart: what they are called with, what their linear layers see, and what they hand on."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.methods.base import LayerInputs
from quantize.model.architecture import Architecture
from quantize.rounding.gram import StatsAccumulator, multiplies_bfloat16

Answer = Callable[[int, Tensor, dict[str, Any]], Tensor]
"""(layer number, its input, keywords of its call) -> what it gives instead of its output."""


LayerCall = Mapping[int, dict[str, Any]]
"""What a model calls a layer with besides its input, by the size of the batch: masks and biases may depend on it."""


@contextlib.contextmanager
def replace_layers(architecture: Architecture, answer: Answer, *, in_tuples: bool) -> Iterator[None]:
    """Have every decoder layer give what `answer` says, inside the block; in_tuples: in a tuple, as some models do."""

    def forward(index: int, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        given = answer(index, hidden_states, kwargs)
        return (given,) if in_tuples else given

    for index, layer in enumerate(architecture.layers):
        layer.forward = partial(forward, index)
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
) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the model calls each decoder layer with for these token ids [n, t]: (input of the first, keywords).

    in_tuples: as `layers_give_tuples` says. Only the modules before the layers must hold weights; the recorded input is
    right for the first layer alone.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
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


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Sequence[Tensor], call: LayerCall) -> Iterator[Tensor]:
    """The layer's output for each batch [b, t, hidden], one after the other.

    Matrix products run in bfloat16 where the hardware has them; what is between the products stays in float32.
    """
    device = next(layer.parameters()).device
    for batch in hidden:
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            output = layer(batch.to(device), **call[len(batch)])
        yield output[0] if isinstance(output, tuple) else output


def spilled(batch: Tensor, path: Path) -> Tensor:
    """A float32 copy of this batch that lives in a file: the system may drop its pages when memory is short."""
    kept = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=torch.float32).view(batch.shape)
    return kept.copy_(batch)


def is_spilled(batch: Tensor) -> bool:
    """Whether `spilled` made it."""
    return batch.untyped_storage().filename is not None


@torch.no_grad()
def observe_layer(architecture: Architecture, index: int, hidden: list[Tensor], call: LayerCall) -> LayerInputs:
    """Run decoder layer `index`, whose weights are loaded in float32, over the calibration text.

    hidden: the layer's input batches [b, t, hidden], replaced in place by its outputs; call: what the model calls
    the layer with besides. Raises UserError when an output is not finite.
    """
    layer, linears = architecture.layers[index], architecture.linears(index)
    prefix = f"{architecture.layers_name}.{index}."
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

    handles = [linear.register_forward_pre_hook(partial(observe, name)) for name, linear in linears.items()]
    for position, output in enumerate(run_layer(layer, hidden, call)):
        if is_spilled(hidden[position]):
            hidden[position].copy_(output)
        else:
            hidden[position] = output
    for handle in handles:
        handle.remove()
    stats = {name: accumulator.finish() for name, accumulator in accumulators.items()}
    sums = (*(batch.sum() for batch in hidden), *(one.gram.diagonal().sum() for one in stats.values()))
    if not all(bool(torch.isfinite(one)) for one in sums):  # NaN and Inf stay in a sum
        raise UserError(f"{prefix[:-1]} gives NaN or Inf on the calibration text: the source model is damaged")
    return LayerInputs(layer, prefix, linears, owners, stats)
