"""A little held-out text that runs beside the calibration, through the layers as they were and as they become.

At the end it tells what the quantization costs, without ever holding the whole model in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.building.inputs import run_layer
from quantize.building.layer import LayerResult
from quantize.building.layer_stub import replace_layers
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
    """The hidden states of the held-out text between two layers, of the source and of the quantized model.

    blocks: token ids, int64 [n, t], t as in the calibration. state: what `state` gave after an earlier layer.
    """

    def __init__(self, blocks: Tensor, state: list[Tensor] | None = None) -> None:
        self.blocks = blocks
        self._exact: Tensor | None = state[0] if state else None
        self._quantized: Tensor | None = state[1] if state else None

    @property
    def state(self) -> list[Tensor]:
        """What is needed to go on after this layer."""
        return [tensor for tensor in (self._exact, self._quantized) if tensor is not None]

    def begin(self, first_input: Callable[[Tensor], Tensor]) -> None:
        """Take the first layer's input, unless an earlier run left a state."""
        if self._exact is None:
            self._exact = self._quantized = first_input(self.blocks)

    def to(self, device: torch.device) -> None:
        """Move the hidden states."""
        self._exact, self._quantized = (None if t is None else t.to(device) for t in (self._exact, self._quantized))

    def before(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        """Run the layer as the source has it."""
        if self._exact is not None:
            self._exact = next(run_layer(layer, [self._exact], kwargs))

    @torch.no_grad()
    def after(
        self, linears: dict[str, nn.Linear], prefix: str, kwargs: dict[str, Any], layer: nn.Module, result: LayerResult
    ) -> None:
        """Put the quantized weights into the scaled layer and run it on what the quantized layers before it gave."""
        for name, linear in linears.items():
            linear.weight.data = result.weights[prefix + name].dequantize().to(linear.weight.device)
        if self._quantized is not None:
            self._quantized = next(run_layer(layer, [self._quantized], kwargs))

    @torch.no_grad()
    def judge(self, model: Any, architecture: Architecture) -> HeldOutResult:
        """Compare what the two predict; the model's norm and output head must hold weights, its layers need not."""
        losses = torch.zeros(2, dtype=torch.float64)
        divergence, tokens = 0.0, 0
        device = model.get_output_embeddings().weight.device
        for index in range(self.blocks.shape[0]):
            ids = self.blocks[index : index + 1].to(device)
            given = [state[index : index + 1] for state in self.state]
            exact, other = (_log_probabilities(model, architecture, ids, hidden) for hidden in given)
            following = ids[0, 1:]
            for row, predicted in enumerate((exact, other)):
                losses[row] -= float(predicted.gather(1, following[:, None]).double().sum())
            divergence += float((exact.exp() * (exact - other)).sum().double())
            tokens += len(following)
        source, quantized = (_exp(float(loss) / tokens) for loss in losses)
        return HeldOutResult(source, quantized, divergence / tokens, tokens)


def _log_probabilities(model: Any, architecture: Architecture, ids: Tensor, hidden: Tensor) -> Tensor:
    """log p of the next token at every position but the last, float32 [t - 1, vocabulary].

    hidden: what the last layer gave.
    """
    with replace_layers(architecture, lambda index, incoming, kwargs: hidden):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
