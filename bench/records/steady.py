"""When a measurement has warmed up, and when it has enough: rules on series of seconds. Imports no torch."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.records.record import Stopped

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """The rules of one measurement.

    Warm-up:  passes at the measured shape until the last `steady_passes` lie within `steady_spread` of one another
              (largest over smallest, less one), at most `max_warmups`, and none after `max_warmup_s` of them.
    Enough:   at least `min_passes` and `min_time_s` of timed passes, and a standard error of their mean of at most
              `noise` of it; or `max_time_s` or `max_passes` of them, whatever the noise.
    """

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
        if min(self.steady_passes, self.min_passes) < 1 or self.max_warmups < self.steady_passes:
            raise ValueError(f"a rule that can never be met: {self}")


def is_steady(seconds: Sequence[float], rule: Rule) -> bool:
    """Whether a warm-up of these passes is over."""
    last = seconds[-rule.steady_passes :]
    return len(last) == rule.steady_passes and max(last) <= (1 + rule.steady_spread) * min(last)


def warm_up(one_pass: Callable[[], float], rule: Rule) -> tuple[tuple[float, ...], bool | None]:
    """Run passes until they are steady or the rule gives up: their seconds, and whether they became steady.

    None where the time was over before that could be told.
    """
    seconds: list[float] = []
    while len(seconds) < rule.max_warmups:
        seconds.append(one_pass())
        if is_steady(seconds, rule):
            return tuple(seconds), True
        if math.fsum(seconds) >= rule.max_warmup_s:
            return tuple(seconds), None
    return tuple(seconds), False


def relative_error(seconds: Sequence[float]) -> float:
    """Standard error of the mean over the mean; infinite for fewer than two values."""
    if len(seconds) < 2:
        return math.inf
    return statistics.stdev(seconds) / math.sqrt(len(seconds)) / statistics.fmean(seconds)


def stop_reason(seconds: Sequence[float], rule: Rule) -> Stopped | None:
    """Why no pass after these is needed; None while one is."""
    spent = math.fsum(seconds)
    if spent >= rule.max_time_s and seconds:
        return "time"
    if len(seconds) >= rule.max_passes:
        return "passes"
    enough = len(seconds) >= rule.min_passes and spent >= rule.min_time_s
    return "noise" if enough and relative_error(seconds) <= rule.noise else None


def repeat(one_pass: Callable[[], T], seconds_of: Callable[[T], float], rule: Rule) -> tuple[tuple[T, ...], Stopped]:
    """Run timed passes until the rule is met: all of them, and what ended them."""
    passes: list[T] = []
    while (reason := stop_reason([seconds_of(one) for one in passes], rule)) is None:
        passes.append(one_pass())
    return tuple(passes), reason
