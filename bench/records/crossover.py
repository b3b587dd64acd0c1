"""What `bench.crossover` leaves: seconds of each way to run a layer, where two ways cross over. Imports no torch."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.records.environment import Environment

SCHEMA_VERSION = 2
CROSSOVER_NAME = "crossover.jsonl"

DECODE_BATCHES = (1, 2, 4, 8, 16, 32)
"""Tokens at once in decode: one for each sequence of the batch."""

PROMPT_TOKENS = (64, 128, 256, 512, 1024, 2048)
"""Tokens at once in prefill: the prompt's, batch 1."""

COUNTS = (*DECODE_BATCHES, *PROMPT_TOKENS)

SAME_WITHIN = 0.03
"""Medians this close are no order."""

MIN_TURNS = 3
"""Fewer turns tell no order."""

AGREEING_TURNS = 0.75
"""Share of the turns that must agree on who is faster: neighbours in time, they saw the same machine."""

Style = Literal["dense", "GEMM", "GEMV", "bitsandbytes"]
Mode = Literal["eager", "CUDA graph"]


@dataclass(frozen=True)
class CrossoverEntry:
    """One way to run the linear layers of a decoder layer (a contender), with so many tokens at once.

    shape, linears: the model's name and its layer's (name, out features, in features). group_size: of the 4-bit
    weights in AWQ's format. tokens: at once; None where the contender cannot run at all. kernel: what ran for that
    many tokens. mode: whether the host asked for every kernel or a CUDA graph replayed them.
    seconds: of one pass through all of the linear layers, one value a turn; turn k of all contenders ran close
    together, the order reversed from one turn to the next.
    relative_error: largest |found - exact| / |exact| of a token's outputs, `error_bound` what was allowed.
    weights_bytes: of one copy of the layer; copies: how many took turns, so that a cache does not hold one.
    reason: why there are no seconds.
    """

    shape: str
    linears: tuple[tuple[str, int, int], ...]
    group_size: int
    device: str
    compute_dtype: str
    contender: str
    style: Style
    tokens: int | None
    measured_at: str
    environment: Environment
    kernel: str | None = None
    mode: Mode = "eager"
    seconds: tuple[float, ...] = ()
    relative_error: float | None = None
    error_bound: float | None = None
    weights_bytes: int | None = None
    copies: int | None = None
    reason: str | None = None
    kind: Literal["crossover"] = "crossover"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if bool(self.seconds) == (self.reason is not None):
            raise ValueError(f"{self.contender}: either seconds or a reason why there are none")
        if self.seconds and self.tokens is None:
            raise ValueError(f"{self.contender}: seconds of how many tokens?")
        if not all(math.isfinite(value) and value > 0 for value in self.seconds):
            raise ValueError(f"{self.contender}: seconds are above 0")

    @property
    def median_s(self) -> float | None:
        """The middle of the turns; None without any."""
        return statistics.median(self.seconds) if self.seconds else None


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
    is faster with fewer and with more tokens; the same when they never cross over, None when no number of tokens
    told an order.
    """

    pair: tuple[str, str]
    tokens: float | None
    faster_below: str | None
    faster_above: str | None


def crossings(entries: Sequence[CrossoverEntry]) -> list[Crossing]:
    """Every crossing of every pair, by tokens; one entry with None for a pair that has none.

    The logarithm of the ratio of medians is taken to be straight in the logarithm of the tokens between two measured
    numbers. Two contenders are in an order where their medians differ by more than SAME_WITHIN and AGREEING_TURNS of
    at least MIN_TURNS turns agree; they cross between two numbers of tokens with opposite orders and nothing
    but ties between.
    """
    found = []
    for one, other in itertools.combinations(series_by_contender(entries).items(), 2):
        found += _crossings_of((one[0], other[0]), one[1], other[1])
    return found


def _crossings_of(
    pair: tuple[str, str], one: Mapping[int, CrossoverEntry], other: Mapping[int, CrossoverEntry]
) -> list[Crossing]:
    common = [tokens for tokens in one if tokens in other]
    logs = [_log_ratio(one[tokens].seconds, other[tokens].seconds) for tokens in common]
    orders = [_order(one[tokens].seconds, other[tokens].seconds) for tokens in common]
    decided = [place for place, order in enumerate(orders) if order]
    faster = {-1: pair[0], 1: pair[1]}
    found = []
    for before, after in itertools.pairwise(decided):
        if orders[before] != orders[after]:
            tokens = _zero(common[before : after + 1], logs[before : after + 1])
            found.append(Crossing(pair, tokens, faster[orders[before]], faster[orders[after]]))
    if found:
        return found
    always = faster[orders[decided[0]]] if decided else None
    return [Crossing(pair, None, always, always)]


def _log_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return math.log(statistics.median(one) / statistics.median(other))


def _order(one: Sequence[float], other: Sequence[float]) -> int:
    """-1 where `one` is faster, 1 where `other` is, 0 where that cannot be told."""
    log = _log_ratio(one, other)
    if abs(log) <= math.log1p(SAME_WITHIN):
        return 0
    turns = list(zip(one, other, strict=False))
    agreeing = sum((mine < theirs) == (log < 0) for mine, theirs in turns)
    if len(turns) < MIN_TURNS or agreeing < AGREEING_TURNS * len(turns):
        return 0
    return -1 if log < 0 else 1


def _zero(tokens: Sequence[int], logs: Sequence[float]) -> float:
    """Where a line through these points, straight in log-log, passes zero; the ends have opposite signs.

    Ties between may wobble around zero: then it is the middle one of the passages, of which there is an odd number.
    """
    passages = []
    for (t0, y0), (t1, y1) in itertools.pairwise(zip(tokens, logs, strict=True)):
        if (y0 < 0) != (y1 < 0):
            passages.append(math.exp(math.log(t0) + math.log(t1 / t0) * y0 / (y0 - y1)))
    return passages[len(passages) // 2]
