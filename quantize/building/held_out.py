"""A little held-out text that runs beside the calibration, through the layers as they were and as they become.

At the end it tells what the quantization costs, without ever holding the whole model in memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.building.inputs import replace_layers, run_layer
from quantize.building.layer import LayerResult
from quantize.errors import UserError
from quantize.model.architecture import Architecture

JUMP = 2.0
"""Perplexity ratio from which on a checkpoint is broken, not quantized."""


@dataclass(frozen=True)
class HeldOutResult:
    """What the held-out text showed, over `tokens` predicted tokens.

    perplexity_source: of the source.
    perplexity:        of the quantized model.
    divergence:        mean KL(source || quantized) in nats a token.
    tokens:            predicted ones.
    """

    perplexity_source: float
    perplexity: float
    divergence: float
    tokens: int

    def check(self) -> None:
        """Raise UserError when the quantized model has lost what the source knows."""
        ratio = self.perplexity / self.perplexity_source
        if not math.isfinite(ratio) or ratio > JUMP:
            raise UserError(
                f"the quantized model is broken: perplexity {self.perplexity:.4g} on held-out text, the source has "
                f"{self.perplexity_source:.4g}; use more --blocks or other --calibration text, or a bnb variant"
            )


class HeldOutCheck:
    """The hidden states of the held-out text between two layers.

    blocks: token ids, int64 [n, t], t as in the calibration. states: of the source and of the quantized model, empty
    before the first layer; an earlier run's go on here.
    """

    def __init__(self, blocks: Tensor, states: Sequence[Tensor] = ()) -> None:
        self.blocks = blocks
        self.states = list(states)

    def begin(self, first_input: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Take the first layer's input, unless an earlier run left states; they go to this device."""
        self.states = [state.to(device) for state in self.states or [first_input(self.blocks)] * 2]

    def before(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        """Run the layer as the source has it."""
        self.states[0] = next(run_layer(layer, self.states[:1], kwargs))

    def after(
        self, linears: dict[str, nn.Linear], prefix: str, kwargs: dict[str, Any], layer: nn.Module, result: LayerResult
    ) -> None:
        """Put the quantized weights into the scaled layer and run it on what the quantized layers before it gave."""
        for name, linear in linears.items():
            linear.weight.data = result.weights[prefix + name].dequantize().to(linear.weight.device)
        self.states[1] = next(run_layer(layer, self.states[1:], kwargs))

    @torch.no_grad()
    def judge(self, model: Any, architecture: Architecture) -> HeldOutResult:
        """Compare what the two predict; the model's norm and output head must hold weights, its layers need not."""
        losses, divergence, tokens = [0.0, 0.0], 0.0, 0
        for ids, *given in zip(self.blocks.to(self.states[0].device), *self.states, strict=True):
            exact, other = (_log_probabilities(model, architecture, ids[None], hidden[None]) for hidden in given)
            for row, predicted in enumerate((exact, other)):
                losses[row] -= float(predicted.gather(1, ids[1:, None]).double().sum())
            divergence += float((exact.exp() * (exact - other)).sum().double())
            tokens += len(ids) - 1
        source, quantized = (torch.tensor(losses, dtype=torch.float64) / tokens).exp().tolist()
        return HeldOutResult(source, quantized, divergence / tokens, tokens)


def _log_probabilities(model: Any, architecture: Architecture, ids: Tensor, hidden: Tensor) -> Tensor:
    """log p of the next token at every position but the last, float32 [t - 1, vocabulary]; hidden: the layers' last."""
    with replace_layers(architecture, lambda index, incoming, kwargs: hidden):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)
