"""What records say beside times: outliers, quality, and what failed."""

import itertools
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.records.record import Latency, Quality, Record, Status

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")

OUTLIER_MADS = 5.0
"""A sample this many (scaled) median absolute deviations from its run's median is called an outlier, never dropped."""


@dataclass(frozen=True)
class Failure:
    """Runs of one checkpoint that did not end well, for one reason.

    work:   the scenario, or the kind of run.
    status: how they ended.
    reason: in one line.
    rounds: in which rounds; empty for a quality run.
    """

    work: str
    status: Status
    reason: str
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Outliers:
    """How many samples lie far from the median of their run, of how many."""

    far: int = 0
    samples: int = 0


def grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """The items that share a key, in the order first met."""
    groups: dict[Key, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def outliers_of(samples: Sequence[float]) -> int:
    """How many lie further from the median than OUTLIER_MADS median absolute deviations and a tenth of the median."""
    if len(samples) < 3:
        return 0
    middle = statistics.median(samples)
    deviation = statistics.median(abs(sample - middle) for sample in samples)
    bound = max(OUTLIER_MADS * 1.4826 * deviation, 0.1 * middle)
    return sum(abs(sample - middle) > bound for sample in samples)


def outliers(latencies: Iterable[Latency]) -> Outliers:
    """The outliers of several runs, prompt passes and decode steps apart."""
    series: list[tuple[float, ...]] = []
    for latency in latencies:
        series += [latency.prefill_s, tuple(itertools.chain.from_iterable(latency.decode_s))]
    return Outliers(sum(map(outliers_of, series)), sum(map(len, series)))


def by_length(latencies: Iterable[Latency]) -> tuple[float, ...]:
    """The median over all passes of all runs, for each prompt length."""
    passes = [one for latency in latencies for one in latency.prefill_by_length_s]
    return tuple(statistics.median(seconds) for seconds in zip(*passes, strict=True))


def latest_quality(records: Iterable[Record]) -> Quality | None:
    """The latest figures."""
    found = [record.quality for record in records if record.status == "ok" and record.quality]
    return found[-1] if found else None


def failures(records: Sequence[Record]) -> tuple[Failure, ...]:
    """Failed runs that no later run of the same work made good, those of one work and reason together."""
    last_good = {(one.kind, one.scenario, one.round): n for n, one in enumerate(records) if one.status == "ok"}
    bad = [
        one
        for n, one in enumerate(records)
        if one.status != "ok" and last_good.get((one.kind, one.scenario, one.round), -1) < n
    ]
    found = grouped(bad, lambda one: (one.scenario.name if one.scenario else one.kind, one.status, one.reason or ""))
    return tuple(
        Failure(*key, tuple(dict.fromkeys(one.round for one in runs if one.round is not None)))
        for key, runs in found.items()
    )
