"""A decoder layer as the quantized model runs it, up to each of its linear layers in turn."""

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.layer_calls import LayerCall, one_layer
from quantize.rounding.correction import Watched
from quantize.rounding.gram import WIDE, InputStats, StatsAccumulator, multiplies_bfloat16


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Sequence[Tensor], calls: Sequence[LayerCall]) -> Iterator[Tensor]:
    """The layer's output for each batch [b, t, hidden] with its call; products in bfloat16 where hardware has them."""
    device = next(layer.parameters()).device
    for batch, call in zip(hidden, calls, strict=True):
        with one_layer(layer), torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            output = layer(batch.to(device), **call)
        yield output[0] if isinstance(output, tuple) else output


def put_weight(linear: Any, weight: Tensor) -> None:
    """Give a linear layer these weights, in the dtype that `run_layer` multiplies them in."""
    half = multiplies_bfloat16(linear.weight.device)
    linear.weight.data = weight.to(linear.weight.device, torch.bfloat16 if half else torch.float32)


def spilled(batch: Tensor, path: Path) -> Tensor:
    """A copy of this batch that lives in a file: the system may drop its pages when memory is short."""
    kept = torch.from_file(str(path), shared=True, size=batch.numel(), dtype=batch.dtype).view(batch.shape)
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

    layer:   the module, its weights in float32; `put` replaces them as they are rounded.
    linears: the names of its linear layers that will be.
    hidden:  the layer's input batches [b, t, hidden] in the quantized model, the last one watched, not calibrated on.
    calls:   what the model calls the layer with besides, for each batch.
    exact:   by owner, what its linear layers see in the source model, [tokens, in] a batch.
    is_last: no other run of this layer follows: what is not needed here any more is freed."""

    layer: nn.Module
    linears: Collection[str]
    hidden: list[Tensor]
    calls: Sequence[LayerCall]
    exact: dict[str, list[Tensor]]
    is_last: bool = False
    _done: set[str] = field(default_factory=set)
    _before: dict[str, Tensor] = field(default_factory=dict)
    _given: dict[tuple[str, int], list[Any]] = field(default_factory=dict)  # by child, once it is done, and batch

    def inputs(
        self, owner: str, weights: Sequence[Tensor], scales: Tensor | None = None
    ) -> tuple[InputStats, Watched] | None:
        """What the owner sees with the weights as they are, and on the watched batch; None where it cannot be told.

        weights: [out_k, in] of all that see it; scales: [in], by which its inputs are divided and those of the source
        model are not yet."""
        if owner not in self.exact:
            return None
        source = self.exact.pop(owner) if self.is_last else self.exact[owner]
        width = source[0].shape[-1]
        few = 2 * sum(map(len, weights)) < width >= WIDE  # else the whole cross term costs less, or is more exact
        accumulator = StatsAccumulator(width, self.hidden[0].device, torch.cat(list(weights)) if few else None)
        for number, exact in enumerate(source):
            seen: list[Tensor] = []

            def stop(module: nn.Module, args: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
                seen.append(args[0].reshape(-1, args[0].shape[-1]))
                raise _Reached

            with self.layer.get_submodule(owner).register_forward_pre_hook(stop), contextlib.suppress(_Reached):
                self._run(number)
            if not seen or seen[0].shape != exact.shape:
                return None
            if number < len(self.hidden) - 1:
                accumulator.add(seen[0], exact, scales)
        return accumulator.finish(), Watched(exact.float() if scales is None else exact / scales, seen[0].float())

    def put(self, name: str, weight: Tensor) -> None:
        """A linear layer's quantized weights, from here on."""
        linear: Any = self.layer.get_submodule(name)
        if not self.is_last:
            self._before.setdefault(name, linear.weight.data)
        self._done.add(name)
        put_weight(linear, weight)

    def finish(self) -> None:
        """Replace `hidden` by the layer's outputs."""
        for number in range(len(self.hidden)):
            replace_batch(self.hidden, number, self._run(number))
        self._given.clear()

    def restore(self) -> None:
        """The weights that the layer had before; the last run keeps none."""
        for name, weight in self._before.items():
            linear: Any = self.layer.get_submodule(name)
            linear.weight.data = weight

    @torch.no_grad()
    def _run(self, number: int) -> Tensor:
        """The layer's output for one batch. A child whose linear layers are done gives what it gave before."""
        with contextlib.ExitStack() as undo:
            for name, child in self.layer.named_children():
                own = [linear for linear in self.linears if linear.startswith(f"{name}.")]
                if len(given := self._given.get((name, number), [])) == 1:
                    child.forward = lambda *args, given=given[0], **kwargs: copy.deepcopy(given)
                    undo.callback(delattr, child, "forward")
                elif own and not given and self._done >= set(own):  # it is called once, or was not called yet
                    put = self._given.setdefault((name, number), []).append
                    undo.enter_context(child.register_forward_hook(lambda m, a, got, put=put: put(copy.deepcopy(got))))
            (output,) = run_layer(self.layer, self.hidden[number : number + 1], self.calls[number : number + 1])
            return output
