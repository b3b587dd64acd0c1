"""Where two ways to run a layer cross over. Imports no torch."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.lab.records import CrossoverEntry

CROSSOVER_NAME = "crossover.jsonl"
DECODE_BATCHES, PROMPT_TOKENS = (1, 2, 4, 8, 16, 32), (64, 128, 256, 512, 1024, 2048)
COUNTS = (*DECODE_BATCHES, *PROMPT_TOKENS)  # tokens at once: of a batch in decode, of one prompt in prefill
SAME_WITHIN = 0.03  # medians this close are no order
MIN_TURNS, AGREEING_TURNS = 3, 0.75  # fewer turns tell no order; of more this share must agree on who is faster


def series_by_contender(entries: Iterable[CrossoverEntry]) -> dict[str, dict[int, CrossoverEntry]]:
    """Contender -> tokens -> entry, where there are seconds: contenders as first met, tokens ascending."""
    found: dict[str, dict[int, CrossoverEntry]] = {entry.contender: {} for entry in entries}
    for entry in sorted(entries, key=lambda one: one.tokens or 0):
        if entry.seconds and entry.tokens is not None:
            found[entry.contender][entry.tokens] = entry
    return {name: series for name, series in found.items() if series}


@dataclass(frozen=True)
class Crossing:
    """Where two contenders cross over.

    tokens: how many at once, between two measured numbers; None when they never do. faster_below, faster_above: who
    is faster with fewer and with more tokens; the same when they never cross over, None when nothing told an order.
    """

    pair: tuple[str, str]
    tokens: float | None
    faster_below: str | None
    faster_above: str | None


def crossings(entries: Sequence[CrossoverEntry]) -> list[Crossing]:
    """Every crossing of every pair, by tokens; one entry with None for a pair that has none.

    The logarithm of the ratio of medians is taken to be straight in the logarithm of the tokens between two measured
    numbers. Two contenders are in an order where their medians differ by more than SAME_WITHIN and AGREEING_TURNS of at
    least MIN_TURNS turns agree; they cross between two numbers of tokens with opposite orders, but for ties between.
    """
    found = []
    series = series_by_contender(entries)
    for names in itertools.combinations(series, 2):
        one, other = (series[name] for name in names)
        common = [tokens for tokens in one if tokens in other]
        logs = [math.log(one[tokens].median_s / other[tokens].median_s) for tokens in common]
        ordered = [_in_order(log, one[t].seconds, other[t].seconds) for t, log in zip(common, logs, strict=True)]
        decided = [place for place, known in enumerate(ordered) if known]
        faster = [names[log > 0] for log in logs]
        turned = [(a, b) for a, b in itertools.pairwise(decided) if faster[a] != faster[b]]
        for a, b in turned:
            found.append(Crossing(names, _zero(common[a : b + 1], logs[a : b + 1]), faster[a], faster[b]))
        if not turned:
            always = faster[decided[0]] if decided else None
            found.append(Crossing(names, None, always, always))
    return found


def _in_order(log: float, one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether it can be told who is faster; log: of the ratio of medians."""
    agreeing = [(mine < theirs) == (log < 0) for mine, theirs in zip(one, other, strict=False)]
    enough = len(agreeing) >= MIN_TURNS and sum(agreeing) >= AGREEING_TURNS * len(agreeing)
    return enough and abs(log) > math.log1p(SAME_WITHIN)


def _zero(tokens: Sequence[int], logs: Sequence[float]) -> float:
    """Where a line through these points, straight in log-log, passes zero; of several passages the middle one."""
    passages = []
    for (t0, y0), (t1, y1) in itertools.pairwise(zip(tokens, logs, strict=True)):
        if (y0 < 0) != (y1 < 0):
            passages.append(math.exp(math.log(t0) + math.log(t1 / t0) * y0 / (y0 - y1)))
    return passages[len(passages) // 2]
