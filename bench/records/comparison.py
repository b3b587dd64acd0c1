"""One checkpoint's time over another's: paired by round (stopping, report). Imports no torch."""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.records.ratio import Ratio, ratio_of
from bench.records.record import PHASES, Phase, Record, latency_records

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """One checkpoint against its reference in one scenario, on one device and in one compute dtype.

    ratios:  for each phase that both have; rounds: how many rounds both finished, of which the ratios are.
    first:   in how many of them the reference ran before the checkpoint.
    apart_s: the longest time between the starts of two paired runs, None where the records do not say."""

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
    """Compare one checkpoint's ok latency records in one scenario with the reference's; None where no round has both.

    Each run is paired with the reference's closest in time of its round, device and dtype. Records are `unique`."""
    by_round = grouped(reference, lambda one: (one.round, one.device, one.compute_dtype))
    pairs = []
    for run in sorted(variant, key=_place):
        if found := by_round.get((run.round, run.device, run.compute_dtype)):
            pairs.append((run, min(found, key=functools.partial(_apart_s, run))))
    if not pairs:
        return None
    ratios: dict[Phase, Ratio] = {}
    for phase in PHASES:
        seconds = [(one.times[phase], other.times[phase]) for one, other in pairs]
        if both := [(ours, theirs) for ours, theirs in seconds if ours is not None and theirs is not None]:
            ratios[phase] = ratio_of(*zip(*both, strict=True))
    first = sum(_place(theirs) <= _place(ours) for ours, theirs in pairs)
    apart = [_apart_s(ours, theirs) for ours, theirs in pairs]
    apart_s = max(apart) if all(map(math.isfinite, apart)) else None
    return Comparison(pairs[0][1].subject.name, ratios, len(pairs), first, apart_s)


def widest_interval(records: Sequence[Record]) -> float | None:
    """The largest half-width of a ratio's interval, as its share: infinite for too few rounds, None without a ratio."""
    good, widths = unique(latency_records(records)), []
    for group in grouped(good, lambda one: (one.subject.baseline, one.device, one.compute_dtype)).values():
        reference = next((one.subject.name for one in group if one.subject.may_be_reference), "")
        series = grouped(group, lambda one: (one.subject.name, one.scenario))
        for (name, scenario), runs in series.items():
            comparison = None if name == reference else compare(runs, series.get((reference, scenario), []))
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
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _place(record: Record) -> tuple[float, int, int]:
    """When it ran: seconds since 1970 (-infinity where that is not known), round, position."""
    began = record.started
    return began.timestamp() if began else -math.inf, record.round or 0, record.position or 0


def _apart_s(one: Record, other: Record) -> float:
    """Seconds between the starts of two runs, not finite where a record does not say."""
    return abs(_place(one)[0] - _place(other)[0])
