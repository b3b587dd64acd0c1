"""How well a model predicts held-out text, and how far its predictions are from the reference's."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.records.record import Divergence, Quality
from bench.worker.request import BUILTIN_LABEL
from quantize.calibration import PARAGRAPH, blocks_sha256, builtin_texts, text_from, token_blocks
from quantize.errors import UserError

LOGIT_ROWS = 64  # turned into float32 at a time
Rows = Iterable[tuple[torch.Tensor, torch.Tensor]]  # log-probabilities float32 [rows, vocabulary], tokens that came


def evaluation_blocks(tokenizer: Any, *, blocks: int, block_tokens: int, data: str | None = None) -> torch.Tensor:
    """Blocks of held-out text, int64 [blocks, block_tokens]; data: as `text_from` reads it, None for our own."""
    texts = [PARAGRAPH.join(builtin_texts("evaluation"))] if data is None else text_from(data)
    return token_blocks(texts, tokenizer, blocks=blocks, block_tokens=block_tokens)


@torch.no_grad()
def predictions(model: Any, blocks: torch.Tensor, *, at_once: int = 1) -> Rows:
    """What the model expects at every position that has a next token, a few rows at a time, block by block.

    Yields log-probabilities float32 [rows, vocabulary] and the tokens that came next, int64 [rows]. Each block is seen
    from its own beginning; at_once: how many go through the model together. Two models give the same rows in one order.
    """
    for group in torch.split(blocks.to(model.device), at_once):
        for block, logits in zip(group, model(input_ids=group, use_cache=False).logits, strict=True):
            for start in range(0, len(block) - 1, LOGIT_ROWS):
                stop = min(start + LOGIT_ROWS, len(block) - 1)
                yield torch.log_softmax(logits[start:stop].float(), dim=-1), block[start + 1 : stop + 1]


class _Likelihood:
    """Adds up the log-likelihood of the tokens that came; refuses what is not finite."""

    def __init__(self, blocks: torch.Tensor, text: str) -> None:
        self._blocks, self._text = blocks, text
        self._total, self._tokens, self._vocabulary = 0.0, 0, 0

    def added(self, rows: Rows) -> Iterator[torch.Tensor]:
        """Add up log-probabilities [rows, vocabulary] and the tokens that came, and give the former back."""
        for own, following in rows:
            loss = -float(own.gather(1, following[:, None]).double().sum())
            if not math.isfinite(loss):
                where = f"near token {self._tokens} of the text"
                raise FloatingPointError(f"its output is not finite (NaN or infinity) {where}")
            self._total += loss
            self._tokens += len(following)
            self._vocabulary = own.shape[-1]
            yield own

    def quality(self, divergence: Divergence | None = None, noise_floor: Divergence | None = None) -> Quality:
        mean_loss = self._total / self._tokens
        try:
            perplexity = math.exp(mean_loss)
        except OverflowError:
            raise FloatingPointError(f"its perplexity is too large for a number (mean loss {mean_loss:.0f})") from None
        facts = (perplexity, self._tokens, self._text, blocks_sha256(self._blocks))
        return Quality(*facts, divergence, noise_floor, vocabulary=self._vocabulary)


def quality(model: Any, blocks: torch.Tensor, *, text: str = BUILTIN_LABEL, expected: Path | None = None) -> Quality:
    """Perplexity, exp(-1/N sum log p(token | its block before it)) over N = blocks * (block_tokens - 1) tokens.

    expected: a file of the reference's log-probabilities on these blocks; with them the divergence is told too.
    Log-likelihoods are in float32, summed in float64. Raises FloatingPointError when the model gives NaN or infinity.
    """
    return _judged(predictions(model, blocks), blocks, text, expected)


def quality_of_file(path: Path, blocks: torch.Tensor, text: str, expected: Path | None, exact: Path | None) -> Quality:
    """As `quality`, of the log-probabilities in a .npy file. exact: a file that the same weights should agree with.

    Raises FloatingPointError where they are no numbers."""
    read, parts = logprobs_reader(path), (part for block in blocks for part in block[1:].split(LOGIT_ROWS))
    return _judged(((read(len(part)), part) for part in parts), blocks, text, expected, exact)


def _judged(rows: Rows, blocks: torch.Tensor, text: str, expected: Path | None, exact: Path | None = None) -> Quality:
    likelihood = _Likelihood(blocks, text)
    judges = [(logprobs_reader(file), _DivergenceSamples()) if file else None for file in (expected, exact)]
    for own in likelihood.added(rows):
        for reference, samples in filter(None, judges):
            samples.add(reference(len(own)).to(own.device), own)
    divergence, from_exact = (judge and judge[1].summary() for judge in judges)
    return replace(likelihood.quality(divergence), from_exact=from_exact)


def reference_quality(model: Any, blocks: torch.Tensor, keep: Path, *, text: str = BUILTIN_LABEL) -> Quality:
    """The reference's own perplexity and noise floor; what it expects is kept in a file for the others.

    The noise floor is its divergence from itself when the same sums are done in another order: attention written out
    (eager) and two blocks at once. Nothing nearer to the reference than that can be told from it."""
    likelihood, again = _Likelihood(blocks, text), _DivergenceSamples()
    write_logprobs(keep, likelihood.added(predictions(model, blocks)), blocks.shape[0] * (blocks.shape[1] - 1))
    before = getattr(model.config, "_attn_implementation", None)
    switch = model.set_attn_implementation if before not in (None, "eager") else lambda name: None
    switch("eager")
    try:
        expected = logprobs_reader(keep)
        for own, _ in predictions(model, blocks, at_once=2):
            again.add(expected(len(own)).to(own.device), own)
    finally:
        switch(before)
    return likelihood.quality(noise_floor=again.summary())


def write_logprobs(path: Path, parts: Iterator[torch.Tensor], tokens: int) -> None:
    """Keep `tokens` rows of log-probabilities: float16 [tokens, vocabulary] (1e-5 nats off), a whole .npy or none."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        at, rows = 0, None
        for part in parts:
            if rows is None:
                shape = (tokens, part.shape[1])
                rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            rows[at : at + len(part)] = part.half().cpu().numpy()
            at += len(part)
        if rows is None or at != tokens:
            raise ValueError(f"{at} rows came, {tokens} were announced")
        rows.flush()
        del rows
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def logprobs_reader(path: Path) -> Callable[[int], torch.Tensor]:
    """(rows) -> the next so many of a file, float32 [rows, vocabulary], normalised anew; UserError at its end."""
    kept, at = np.load(path, mmap_mode="r", allow_pickle=False), 0

    def read(rows: int) -> torch.Tensor:
        nonlocal at
        at += rows
        if at > len(kept):
            raise UserError(f"{path} holds {len(kept)} tokens, more were asked for: delete it and run again")
        return torch.log_softmax(torch.from_numpy(np.array(kept[at - rows : at])).float(), dim=-1)

    return read


def kl_nats(reference: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) in nats of rows of log-probabilities [rows, vocabulary]: float64 [rows]."""
    terms = reference.exp() * (reference - own)
    terms.masked_fill_(reference.isneginf(), 0)  # 0 log 0
    return terms.sum(dim=-1, dtype=torch.float64)


class _DivergenceSamples:
    """KL(reference || model) of each token, and how often the likeliest token is another."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._flips = 0

    def add(self, reference: torch.Tensor, own: torch.Tensor) -> None:
        self._parts.append(kl_nats(reference, own).cpu())
        choice = own.argmax(dim=-1, keepdim=True)
        # A choice as likely as the reference's best is no flip: half precision makes ties.
        self._flips += int((reference.gather(1, choice)[:, 0] < reference.amax(dim=-1)).sum())

    def summary(self) -> Divergence:
        samples = torch.cat(self._parts)
        if not bool(samples.isfinite().all()):
            raise FloatingPointError("its divergence from the reference is not finite (NaN or infinity)")
        median, p99 = (float(samples.quantile(share)) for share in (0.5, 0.99))
        return Divergence(float(samples.mean()), median, p99, flips=self._flips / len(samples))
