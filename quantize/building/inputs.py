"""A decoder layer run on the calibration text: what its linear layers see, and what it hands on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.methods.base import LayerInputs
from quantize.model.architecture import Architecture
from quantize.rounding.gram import InputStats, StatsAccumulator, multiplies_bfloat16


class _InputObserver:
    """Hooks on a layer's linear modules that add up the statistics of their inputs, once per distinct input."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._owners: dict[str, str] = {}
        self._accumulators: dict[str, StatsAccumulator] = {}
        self._last: tuple[Tensor, str] | None = None
        self._handles = [linear.register_forward_pre_hook(self._hook(name, linear)) for name, linear in linears.items()]

    def _hook(self, name: str, linear: nn.Linear) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs: Tensor = args[0]
            if name not in self._owners:
                shared = self._last is not None and self._last[0] is inputs
                self._owners[name] = self._last[1] if shared and self._last else name
                if not shared:
                    self._accumulators[name] = StatsAccumulator(linear.in_features, inputs.device)
            owner = self._owners[name]
            if owner == name:
                self._accumulators[name].add(inputs)
            self._last = (inputs, owner)

        return observe

    def finish(self) -> tuple[dict[str, str], dict[str, InputStats]]:
        """Remove the hooks; return linear -> owner of its input, and owner -> statistics."""
        for handle in self._handles:
            handle.remove()
        self._last = None
        return self._owners, {name: accumulator.finish() for name, accumulator in self._accumulators.items()}


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Sequence[Tensor], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The layer's output for each batch [b, t, hidden], one after the other.

    Matrix products run in bfloat16 where the hardware has them; what is between the products stays in float32.
    """
    weights = next(layer.parameters())
    for kept in hidden:
        batch = kept.to(weights.device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=multiplies_bfloat16(batch.device)):
            output = layer(batch, **kwargs)
        yield output[0] if isinstance(output, tuple) else output


def spilled(batch: Tensor, path: Path) -> Tensor:
    """A float32 copy of this batch that lives in a file: the system may drop its pages when memory is short."""
    kept = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=torch.float32).view(batch.shape)
    return kept.copy_(batch)


def is_spilled(batch: Tensor) -> bool:
    """Whether `spilled` made it."""
    return batch.untyped_storage().filename is not None


@torch.no_grad()
def observe_layer(architecture: Architecture, index: int, hidden: list[Tensor], kwargs: dict[str, Any]) -> LayerInputs:
    """Run decoder layer `index`, whose weights are loaded in float32, over the calibration text.

    hidden: the layer's input batches [b, t, hidden], replaced in place by its outputs; kwargs: what the model calls
    the layer with besides. Raises UserError when an output is not finite.
    """
    layer = architecture.layers[index]
    prefix = f"{architecture.layers_name}.{index}."
    linears = architecture.linears(index)
    observer = _InputObserver(linears)
    for position, output in enumerate(run_layer(layer, hidden, kwargs)):
        if is_spilled(hidden[position]):
            hidden[position].copy_(output)
        else:
            hidden[position] = output
    owners, stats = observer.finish()
    if not all(bool(torch.isfinite(batch.sum())) for batch in hidden):  # NaN and Inf stay in a sum
        raise UserError(f"{prefix[:-1]} gives NaN or Inf on the calibration text: the source model is damaged")
    return LayerInputs(layer, prefix, linears, owners, stats)
