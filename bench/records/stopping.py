"""When enough is measured: the rules for rounds of a bench and for passes of one run. Imports no torch."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from quantize.errors import UserError

T = TypeVar("T")
RoundsStopReason = Literal["noise", "time", "rounds"]
PassesStopReason = Literal["noise", "time", "passes"]


@dataclass(frozen=True)
class RoundsRule:
    """How many rounds to measure: `least`, then more until every ratio is precise, at most `most`.

    least:      rounds that are always measured; most: rounds that are never exceeded.
    noise:      half the width of the 95% interval of a ratio, as a share of it, that is precise enough.
    max_time_s: no further round begins that would end later than this after the bench began."""

    least: int = 3
    most: int = 10
    noise: float = 0.05
    max_time_s: float = 300.0

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UserError("rounds.least must be at least 1")
        if not self.noise > 0:
            raise UserError("rounds.noise must be above 0")
        if not self.max_time_s >= 0:
            raise UserError("rounds.max_time_s must be at least 0 seconds")

    def stop_reason(
        self, done: int, widest: Callable[[], float | None], elapsed_s: float, round_s: float
    ) -> RoundsStopReason | None:
        """Why no further round is needed after `done` of them; None where one is.

        widest: the largest half-width of a ratio's interval as a share of it, None where there is no ratio.
        elapsed_s: since the bench began; round_s: what one more round will take."""
        if done < self.least:
            return None
        if done >= max(self.most, self.least):
            return "rounds"
        width = widest()
        if width is None:
            return "rounds"  # nothing has a ratio, and more rounds give it none
        if width <= self.noise:
            return "noise"
        return "time" if elapsed_s + round_s > self.max_time_s else None


@dataclass(frozen=True)
class PassRule:
    """When one run is warm, and when it has timed enough passes.

    steady_passes: the warm-up is over when this many passes in a row agree.
    steady_spread: they agree when the slowest is longer than the fastest by at most this share.
    max_warmups:   passes after which the warm-up ends anyway; max_warmup_s: seconds of warm-up that end it.
    min_passes:    timed passes at least; min_time_s: seconds of timed passes at least.
    noise:         standard error of their mean, as a share of it, that is low enough.
    max_time_s:    seconds of timed passes, and max_passes: timed passes, after which no more follow."""

    steady_passes: int = 2
    steady_spread: float = 0.10
    max_warmups: int = 6
    max_warmup_s: float = 60.0
    min_passes: int = 3
    min_time_s: float = 1.0
    noise: float = 0.03
    max_time_s: float = 3.0
    max_passes: int = 200

    def __post_init__(self) -> None:
        limits = (self.steady_spread, self.max_warmup_s, self.min_time_s, self.noise, self.max_time_s)
        counts = (self.steady_passes, self.min_passes, self.max_passes)
        if not all(limit >= 0 for limit in limits) or min(counts) < 1 or self.max_warmups < self.steady_passes:
            raise ValueError(f"a rule that can never be met: {self}")


@dataclass(frozen=True)
class Rules:
    """Under which rules a record was measured. rounds: of the bench; rule: of one run."""

    rounds: RoundsRule | None = None
    rule: PassRule | None = None


def warm_up(one_pass: Callable[[], float], rule: PassRule) -> tuple[tuple[float, ...], bool | None]:
    """Run passes until steady, or the rule gives up: their seconds, and whether they became so (None: no time left)."""
    seconds: list[float] = []
    while len(seconds) < rule.max_warmups:
        seconds.append(one_pass())
        last = seconds[-rule.steady_passes :]
        if len(last) == rule.steady_passes and max(last) <= (1 + rule.steady_spread) * min(last):
            return tuple(seconds), True
        if math.fsum(seconds) >= rule.max_warmup_s:
            return tuple(seconds), None
    return tuple(seconds), False


def standard_error(seconds: Sequence[float]) -> float:
    """Standard error of the mean over the mean; infinite for fewer than two values."""
    few = len(seconds) < 2
    return math.inf if few else statistics.stdev(seconds) / math.sqrt(len(seconds)) / statistics.fmean(seconds)


def stop_reason(seconds: Sequence[float], rule: PassRule) -> PassesStopReason | None:
    """Why no pass after these is needed; None while one is."""
    spent = math.fsum(seconds)
    if spent >= rule.max_time_s and seconds:
        return "time"
    if len(seconds) >= rule.max_passes:
        return "passes"
    enough = len(seconds) >= rule.min_passes and spent >= rule.min_time_s
    return "noise" if enough and standard_error(seconds) <= rule.noise else None


def repeat(
    one_pass: Callable[[], T], seconds_of: Callable[[T], float], rule: PassRule
) -> tuple[tuple[T, ...], PassesStopReason]:
    """Run timed passes until the rule is met: all of them, and what ended them."""
    passes: list[T] = []
    while (reason := stop_reason([seconds_of(one) for one in passes], rule)) is None:
        passes.append(one_pass())
    return tuple(passes), reason
