"""A model whose decoder layers are replaced: to see what they are called with, or to run what is around them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.architecture import Architecture

Answer = Callable[[int, Tensor, dict[str, Any]], Tensor]
"""(layer number, its input, keywords of its call) -> what it gives instead of its output."""


class LayerStub(nn.Module):
    """Stands where a decoder layer stood and answers for it; has the layer's attributes."""

    def __init__(self, index: int, layer: nn.Module, answer: Answer) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._index = index
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        return self._answer(self._index, hidden, kwargs)


@contextlib.contextmanager
def replace_layers(architecture: Architecture, answer: Answer) -> Iterator[None]:
    """Replace every decoder layer by one that gives what `answer` says, inside the block."""
    layers = architecture.layers
    originals = list(layers)
    for index, layer in enumerate(originals):
        layers[index] = LayerStub(index, layer, answer)
    try:
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


class _AllRecorded(Exception):  # noqa: N818 - it signals, it does not fail
    """The model has called its last layer: nothing after it is needed."""


@torch.no_grad()
def layer_calls(model: Any, architecture: Architecture, blocks: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the model calls each decoder layer with for these token ids [n, t]: (input of the first, keywords).

    Only the modules before the layers must hold weights; the recorded input is right for the first layer alone.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        calls.append((hidden, kwargs))
        if index == len(architecture.layers) - 1:
            raise _AllRecorded
        return hidden

    with replace_layers(architecture, record), contextlib.suppress(_AllRecorded):
        model(input_ids=blocks, use_cache=False)
    return calls
