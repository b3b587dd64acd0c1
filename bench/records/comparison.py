"""One checkpoint's time over another's: paired by round (stopping, report). Imports no torch."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.records.ratio import Ratio, ratio_of
from bench.records.record import PHASES, Phase, Record, latency_records

Setting = tuple[str, str | None]
"""Device and compute dtype: records of different settings are never paired."""

_Run = tuple[tuple[float, int, int], Record]
"""A record behind its place in time: seconds since 1970 (-infinity where that is not known), round, position."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """One checkpoint against its reference in one scenario, on one device and in one compute dtype.

    ratios:  for each phase that both have.
    rounds:  how many rounds both finished; the ratios are over these.
    first:   in how many of them the reference ran before the checkpoint.
    apart_s: the longest time between the starts of two paired runs, None where the records do not say.
    """

    reference: str
    ratios: dict[Phase, Ratio]
    rounds: int
    first: int
    apart_s: float | None

    @property
    def order_balanced(self) -> bool:
        """Whether each of the two went first in some round; if not, the machine's drift is in the ratio."""
        return self.rounds < 2 or 0 < self.first < self.rounds


def compare(variant: Sequence[Record], reference: Sequence[Record]) -> Comparison | None:
    """Compare the ok latency records of one checkpoint in one scenario with the reference's, paired by round.

    Each run of the checkpoint is paired with the reference's run of the same round, device and compute dtype, and where
    that was measured more than once with the one that started closest in time. None when no round has both. No record
    is there twice (`unique`).
    """
    pairs = _paired(variant, reference)
    if not pairs:
        return None
    ratios: dict[Phase, Ratio] = {}
    for phase in PHASES:
        seconds = [(one.times[phase], other.times[phase]) for (_, one), (_, other) in pairs]
        both = [(ours, theirs) for ours, theirs in seconds if ours is not None and theirs is not None]
        if both:
            ratios[phase] = ratio_of(*zip(*both, strict=True))
    apart = [_apart_s(one, other) for one, other in pairs]
    return Comparison(
        reference=pairs[0][1][1].subject.name,
        ratios=ratios,
        rounds=len(pairs),
        first=sum(theirs <= ours for (ours, _), (theirs, _) in pairs),
        apart_s=max(apart) if all(map(math.isfinite, apart)) else None,
    )


def widest_interval(records: Sequence[Record]) -> float | None:
    """The largest half-width of a ratio's interval over all checkpoints and scenarios, as a share of the ratio.

    Infinite where one has too few rounds for an interval; None where there is no ratio at all.
    """
    good = unique(latency_records(records))
    references: dict[tuple[str, Setting], str] = {}
    for record in good:
        if record.subject.may_be_reference:
            references.setdefault((record.subject.baseline, _setting(record)), record.subject.name)
    series: dict[Any, list[Record]] = grouped(
        good, lambda one: (one.subject.baseline, one.scenario, _setting(one), one.subject.name)
    )
    widths = []
    for (baseline, scenario, setting, name), runs in series.items():
        reference_name = references.get((baseline, setting))
        if name == reference_name:
            continue
        comparison = compare(runs, series.get((baseline, scenario, setting, reference_name), []))
        if comparison is not None and "total" in comparison.ratios:
            low, high = comparison.ratios["total"].interval or (1.0, math.inf)
            widths.append(math.sqrt(high / low) - 1)
    return max(widths, default=None)


def unique(records: Iterable[Record]) -> list[Record]:
    """Every record once: one that stands twice in a file is one measurement."""
    found: dict[Hashable, Record] = {}
    for one in records:
        when = (one.started_at, one.wall_s, one.position, one.round)
        found[(*when, one.kind, one.status, one.device, one.compute_dtype, one.subject, one.scenario)] = one
    return list(found.values())


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items that share a key, in the order first met."""
    groups: defaultdict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _setting(record: Record) -> Setting:
    return record.device, record.compute_dtype


def _paired(variant: Sequence[Record], reference: Sequence[Record]) -> list[tuple[_Run, _Run]]:
    """Pairs of one round each, in the order in which they ran."""
    by_round = grouped(map(_run, reference), lambda one: (one[1].round, *_setting(one[1])))
    pairs = []
    for run in map(_run, variant):
        if found := by_round.get((run[1].round, *_setting(run[1]))):
            pairs.append((run, found[0] if len(found) == 1 else min(found, key=functools.partial(_apart_s, run))))
    return sorted(pairs, key=lambda pair: pair[0][0])


def _run(record: Record) -> _Run:
    began = record.started
    return (began.timestamp() if began else -math.inf, record.round or 0, record.position or 0), record


def _apart_s(one: _Run, other: _Run) -> float:
    """Seconds between the starts of two runs, not finite where a record does not say."""
    return abs(one[0][0] - other[0][0])
