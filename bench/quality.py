"""How well a model predicts held-out text: perplexity on fixed blocks of tokens."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from bench.record import Quality
from quantize.calibration import blocks_sha256, builtin_text, token_blocks

LOGIT_ROWS = 64
"""Positions whose logits are turned into float32 at a time."""


def evaluation_blocks(tokenizer: Any, *, blocks: int, block_tokens: int) -> torch.Tensor:
    """Blocks of the built-in evaluation text, which no calibration sees: int64 [blocks, block_tokens]."""
    return token_blocks([builtin_text("evaluation")], tokenizer, blocks=blocks, block_tokens=block_tokens)


@torch.no_grad()
def predictions(model: Any, blocks: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the model expects at every position that has a next token, a few rows at a time, block by block.

    Yields logits float32 [rows, vocabulary] and the tokens that came next, int64 [rows]. Each block is seen
    from its own beginning. Two models walked side by side give the same rows in the same order.
    """
    for block in blocks.to(model.device):
        logits = model(input_ids=block[None], use_cache=False).logits[0]
        for start in range(0, len(block) - 1, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, len(block) - 1)
            yield logits[start:stop].float(), block[start + 1 : stop + 1]


def perplexity(model: Any, blocks: torch.Tensor, *, text: str = "builtin evaluation") -> Quality:
    """exp(-1/N sum log p(token | its block before it)) over the N = blocks * (block_tokens - 1) tokens.

    Log-likelihoods are computed in float32 and summed in float64. Raises FloatingPointError when the model
    gives NaN or infinity.
    """
    total, tokens = 0.0, 0
    for logits, following in predictions(model, blocks):
        loss = float(torch.nn.functional.cross_entropy(logits, following, reduction="none").double().sum())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the model's output is not finite (NaN or infinity) near token {tokens} of the text: "
                "this checkpoint is broken"
            )
        total += loss
        tokens += len(following)
    return Quality(perplexity=_exp(total / tokens), tokens=tokens, text=text, text_sha256=blocks_sha256(blocks))


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        raise FloatingPointError(
            f"the perplexity is too large for a number (mean loss {mean_loss:.0f}): this checkpoint is broken"
        ) from None


@torch.no_grad()
def divergences(reference: Any, model: Any, blocks: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of the next-token distributions in nats, float64 [blocks * (block_tokens - 1)].

    The two models are walked side by side, so that no logits of the whole text are kept.
    """
    parts = []
    pairs = zip(predictions(reference, blocks), predictions(model, blocks), strict=True)
    for (expected, _), (logits, _) in pairs:
        exact = torch.log_softmax(expected.double(), dim=-1)
        other = torch.log_softmax(logits.double(), dim=-1)
        parts.append((exact.exp() * (exact - other)).sum(dim=-1))
    return torch.cat(parts)
