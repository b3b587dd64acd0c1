"""What a model calls its decoder layers with, and what it expects of them: how one layer can be run by itself."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.model.apart import Expert
from quantize.model.architecture import Architecture, architecture_of
from quantize.model.skeleton import Skeleton, empty

LayerCall = dict[str, Any]  # what a model calls a layer with besides its input, by keyword: of one batch, as masks are
MOST_OUTPUTS, SOME_TOKENS = 3, 16


@contextlib.contextmanager
def replace_layers(architecture: Architecture, answer: Callable[[int, Tensor, LayerCall], Tensor]) -> Iterator[None]:
    """Have every decoder layer give what `answer` says of its number, its input and its call, inside the block."""
    outputs = architecture.outputs

    def forward(index: int, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        given = dict(zip(names, args, strict=False)) | kwargs
        output = answer(index, given.pop(names[0]), given)
        return (output, *[None] * (outputs - 1)) if outputs else output

    for index, layer in enumerate(architecture.layers):
        layer.forward = partial(forward, index, list(inspect.signature(layer.forward).parameters))
    try:
        yield
    finally:
        for layer in architecture.layers:
            del layer.forward


class _AllRecorded(Exception):  # noqa: N818 - it signals, it does not fail
    """The model has called its last layer: nothing after it is needed."""


@torch.no_grad()
def layer_calls(model: Any, architecture: Architecture, blocks: Tensor) -> list[tuple[Tensor, LayerCall]]:
    """What the model calls each decoder layer with for these token ids [n, t]: (input of the first, keywords).

    Only the modules before the layers must hold weights; the recorded input is right for the first layer alone."""
    calls: list[tuple[Tensor, LayerCall]] = []

    def record(index: int, hidden: Tensor, kwargs: LayerCall) -> Tensor:
        calls.append((hidden, kwargs))
        if index == len(architecture.layers) - 1:
            raise _AllRecorded
        return hidden

    with replace_layers(architecture, record), contextlib.suppress(_AllRecorded):
        model(input_ids=blocks, use_cache=False)
    return calls


def _first_calls(model: Any, given: Architecture, ids: Tensor) -> tuple[Architecture, list[tuple[Tensor, LayerCall]]]:
    """The architecture with its outputs, found by trying, and what `layer_calls` gives with them."""
    failed: Exception | None = None
    for outputs in range(MOST_OUTPUTS + 1):
        found = replace(given, outputs=outputs)
        try:
            calls = layer_calls(model, found, ids)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            failed = failed or error
            continue
        if len(calls) == len(given.layers) and len({hidden.shape for hidden, _ in calls}) == 1:
            return found, calls
    reason = failed or "not each of them once"
    raise UserError(f"{type(model).__name__} calls its layers in a way that is not known here ({reason}): use bnb-8bit")


def shared(value: Any, like: Any) -> Any:
    """`value`, its tensors those of `like` where they are equal: one copy for all batches, if they allow it."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        return like if value.shape == like.shape and torch.equal(value, like) else value
    if isinstance(value, tuple) and isinstance(like, tuple) and len(value) == len(like):
        return tuple(shared(one, other) for one, other in zip(value, like, strict=True))
    return value


@contextlib.contextmanager
def one_layer(layer: nn.Module) -> Iterator[None]:
    """What a layer raises because it is run by itself becomes one line: some need what others have left."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{type(layer).__name__} cannot be run by itself ({reason}): use bnb-8bit or fp16") from error


def structure(layer: nn.Module) -> str:
    """What layers of one kind have in common: class, names and shapes of parameters."""
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in layer.named_parameters()]
    return f"{type(layer).__name__} {shapes}"


@torch.no_grad()
def runnable(skeleton: Skeleton, device: torch.device) -> Architecture:
    """The decoder layers, without the linear layers that cannot be packed.

    Those are read and not called, or never used, or files name their weights otherwise than `.weight`. Runs the first
    layer of each kind on a few tokens; memory holds the embeddings and that layer. Raises UserError as
    `architecture_of` does, and for layers that cannot be run by themselves."""
    model, architecture = skeleton.model, architecture_of(skeleton.model)
    ids = torch.arange(SOME_TOKENS, device=device).view(1, SOME_TOKENS) + 3
    skeleton.fill_outer(architecture.layers_name, device)
    architecture, calls = _first_calls(model, architecture, ids)
    kinds: dict[str, set[str]] = {}
    for index, (layer, (_, call)) in enumerate(zip(architecture.layers, calls, strict=True)):
        kind = structure(layer)
        if kind in kinds:
            continue
        skeleton.fill(layer, architecture.prefix(index), device)
        called: set[nn.Module] = set()
        linears = architecture.linears(index)
        with contextlib.ExitStack() as hooks, one_layer(layer):
            for linear in linears.values():
                hooks.enter_context(linear.register_forward_pre_hook(lambda module, args, own=called: own.add(module)))
            layer(calls[0][0].clone(), **call)
        empty(layer)
        skeleton.forget_stacks()
        called |= {linear for expert in layer.modules() if isinstance(expert, Expert) for linear in expert.children()}
        kinds[kind] = {name for name, linear in linears.items() if linear not in called}
    skeleton.empty_outer(architecture.layers_name)
    kept = {
        architecture.prefix(index) + name
        for index, layer in enumerate(architecture.layers)
        for name in architecture.linears(index)
        if name in kinds[structure(layer)]
        or not skeleton.stored[f"{architecture.prefix(index)}{name}.weight"].endswith(".weight")
    }
    return replace(architecture, kept=architecture.kept | kept)
