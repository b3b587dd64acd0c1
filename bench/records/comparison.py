"""From records to comparisons: each checkpoint against the reference of its base model, round by round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from bench.records.ratio import Ratio, ratio_of
from bench.records.record import PHASES, Phase, Record
from bench.records.scenario import Scenario


@dataclass(frozen=True)
class Comparison:
    """One checkpoint against its reference in one scenario.

    subject, reference: their names.
    ratios:      for each phase that both have: "total" (prefill and decode), "prefill", "decode" (a token).
    rounds:      how many rounds both finished; the ratios are over these.
    first:       in how many of them the reference ran before the checkpoint.
    apart_s:     the longest time between the starts of two paired runs, None where the records do not tell.
    """

    subject: str
    reference: str
    scenario: Scenario
    ratios: dict[Phase, Ratio]
    rounds: int
    first: int
    apart_s: float | None

    @property
    def order_balanced(self) -> bool:
        """Whether each of the two went first in some round; if not, the machine's drift is in the ratio."""
        return self.rounds < 2 or 0 < self.first < self.rounds


def compare(scenario: Scenario, variant: Sequence[Record], reference: Sequence[Record]) -> Comparison | None:
    """Compare the ok latency records of one checkpoint in one scenario with the reference's, paired by round.

    Each run of the checkpoint is paired with the reference's run of the same round, and where a round was
    measured more than once with the one that started closest in time. None when no round has both.
    """
    pairs = _paired(variant, reference)
    if not pairs:
        return None
    ratios: dict[Phase, Ratio] = {}
    for phase in PHASES:
        seconds = [(one.seconds(phase), other.seconds(phase)) for one, other in pairs]
        both = [(ours, theirs) for ours, theirs in seconds if ours is not None and theirs is not None]
        if both:
            ratios[phase] = ratio_of([ours for ours, _ in both], [theirs for _, theirs in both])
    apart = [_apart_s(one, other) for one, other in pairs]
    return Comparison(
        subject=pairs[0][0].subject.name,
        reference=pairs[0][1].subject.name,
        scenario=scenario,
        ratios=ratios,
        rounds=len(pairs),
        first=sum(_order(other) <= _order(one) for one, other in pairs),
        apart_s=None if None in apart else max(value for value in apart if value is not None),
    )


def started(record: Record) -> datetime | None:
    """When the run started; a time without a zone counts as UTC, an unreadable one is None."""
    try:
        moment = datetime.fromisoformat(record.started_at)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _paired(variant: Sequence[Record], reference: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Pairs of one round each, in the order in which they ran."""
    pairs = []
    for record in variant:
        candidates = [other for other in reference if other.round == record.round]
        if candidates:
            pairs.append((record, min(candidates, key=lambda other: _distance(record, other))))
    return sorted(pairs, key=lambda pair: _order(pair[0]))


def _distance(one: Record, other: Record) -> float:
    apart = _apart_s(one, other)
    return math.inf if apart is None else apart


def _apart_s(one: Record, other: Record) -> float | None:
    start, other_start = started(one), started(other)
    if start is None or other_start is None:
        return None
    return abs((start - other_start).total_seconds())


def _order(record: Record) -> tuple[float, int, int]:
    moment = started(record)
    return (0.0 if moment is None else moment.timestamp(), record.round or 0, record.position or 0)


def widest_interval(records: Sequence[Record]) -> float | None:
    return None


def comparison_lines(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    return []
