"""A decoder layer as the quantized model runs it, up to each of its linear layers in turn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.layer_calls import LayerCall, one_layer
from quantize.rounding.gptq import Watched
from quantize.rounding.gram import InputStats, StatsAccumulator, multiplies_bfloat16


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Sequence[Tensor], calls: Sequence[LayerCall]) -> Iterator[Tensor]:
    """The layer's output for each batch [b, t, hidden] with its call; products in bfloat16 where hardware has them."""
    device = next(layer.parameters()).device
    for batch, call in zip(hidden, calls, strict=True):
        with one_layer(layer), torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            output = layer(batch.to(device), **call)
        yield output[0] if isinstance(output, tuple) else output


def spilled(batch: Tensor, path: Path) -> Tensor:
    """A float32 copy of this batch that lives in a file: the system may drop its pages when memory is short."""
    kept = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=torch.float32).view(batch.shape)
    return kept.copy_(batch)


def replace_batch(hidden: list[Tensor], position: int, output: Tensor) -> None:
    """Put a batch in the place of another, in the other's file where it lies in one."""
    there = hidden[position]
    hidden[position] = output if there.untyped_storage().filename is None else there.copy_(output)


class _Reached(Exception):  # noqa: N818 - it signals, it does not fail
    """The layer has called the module that was waited for: nothing after it is needed."""


@dataclass
class QuantizedRun:
    """What one quantized model's decoder layer sees and gives while its linear layers are rounded one after the other.

    layer:  the module, its weights in float32; `put` replaces them as they are rounded.
    hidden: the layer's input batches [b, t, hidden] in the quantized model, the last one watched: it is not calibrated
            on, but tells whether a correction holds on other text.
    calls:  what the model calls the layer with besides, for each batch.
    exact:  by owner, what its linear layers see in the source model, [tokens, in] a batch.
    """

    layer: nn.Module
    hidden: list[Tensor]
    calls: Sequence[LayerCall]
    exact: Mapping[str, list[Tensor]]
    _before: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, owner: str, scales: Tensor | None = None) -> tuple[InputStats, Watched] | None:
        """What the owner sees with the weights as they are, and on the watched batch; None where it cannot be told.

        scales: [in], by which its inputs are divided and those of the source model are not yet.
        """
        if owner not in self.exact:
            return None
        pairs = []
        accumulator = None
        for batch, call, exact in zip(self.hidden, self.calls, self.exact[owner], strict=True):
            found = self._reach(owner, batch, call)
            if found is None or found.shape != exact.shape:
                return None
            exact = exact if scales is None else exact / scales
            if accumulator is None:
                accumulator = StatsAccumulator(found.shape[-1], found.device)
            if len(pairs) < len(self.hidden) - 1:
                accumulator.add(found, exact)
                pairs.append(None)
            else:
                watched = Watched(exact.float(), found.float())
        return accumulator.finish(), watched

    def put(self, name: str, weight: Tensor) -> None:
        """A linear layer's quantized weights, from here on."""
        linear: Any = self.layer.get_submodule(name)
        self._before.setdefault(name, linear.weight.data)
        linear.weight.data = weight.to(linear.weight.dtype)

    def finish(self) -> None:
        """Replace `hidden` by the layer's outputs."""
        for position, output in enumerate(run_layer(self.layer, self.hidden, self.calls)):
            replace_batch(self.hidden, position, output)

    def restore(self) -> None:
        """The weights that the layer had before."""
        for name, weight in self._before.items():
            linear: Any = self.layer.get_submodule(name)
            linear.weight.data = weight
        self._before.clear()

    @torch.no_grad()
    def _reach(self, name: str, batch: Tensor, call: LayerCall) -> Tensor | None:
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].reshape(-1, args[0].shape[-1]))
            raise _Reached

        with self.layer.get_submodule(name).register_forward_pre_hook(stop):
            try:
                for _ in run_layer(self.layer, [batch], [call]):
                    pass
            except _Reached:
                pass
        return found[0] if found else None
