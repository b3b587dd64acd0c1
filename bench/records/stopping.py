"""Whether the rounds of a bench are enough: how noisy its ratios still are. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench.records.phase import phase_s
from bench.records.ratio import ratio_of
from bench.records.record import Record, family_of, latency_records, may_be_reference
from quantize.errors import UserError

Enough = Literal["noise", "time", "rounds"]


@dataclass(frozen=True)
class Rounds:
    """How many rounds to measure: `least`, then more until every ratio is known to `noise`, at most `most`.

    noise: half the width of the 95% interval of a ratio, as a share of it. max_time_s: no further round begins that
    would end later than this after the bench began.
    """

    least: int = 3
    most: int = 10
    noise: float = 0.05
    max_time_s: float = 300.0

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UserError("--rounds must be at least 1")
        if not self.noise > 0:
            raise UserError("--noise must be above 0")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def enough(self, done: int, records: Sequence[Record], elapsed_s: float, round_s: float) -> Enough | None:
        """Why no further round is needed after `done` of them; None where one is.

        elapsed_s: since the bench began; round_s: what one more round will take.
        """
        if done < self.least:
            return None
        if done >= max(self.most, self.least):
            return "rounds"
        known = widest_interval(records)
        if known is None:
            return "rounds"  # nothing has a ratio, and more rounds give it none
        if known <= self.noise:
            return "noise"
        return "time" if elapsed_s + round_s > self.max_time_s else None


def widest_interval(records: Sequence[Record]) -> float | None:
    """The largest half-width of a ratio's interval over all checkpoints and scenarios, as a share of the ratio.

    Infinite where one has too few rounds for an interval; None where there is no ratio at all.
    """
    seconds: dict[tuple[Any, ...], dict[int | None, float]] = {}
    references: dict[str, str] = {}
    for record in latency_records(records):
        spent = phase_s(record, "total")
        subject, family = record.subject, family_of(record.subject)
        if may_be_reference(subject):
            references.setdefault(family, subject.name)
        if spent is not None:
            is_reference = references.get(family) == subject.name
            key = (family, record.scenario, is_reference, subject.name)
            seconds.setdefault(key, {})[record.round] = spent
    widths = []
    for (family, scenario, is_reference, _), own in seconds.items():
        reference = next((other for key, other in seconds.items() if key[:3] == (family, scenario, True)), None)
        if is_reference or reference is None:
            continue
        both = sorted(number for number in own.keys() & reference.keys() if number is not None)
        ratio = ratio_of([own[n] for n in both], [reference[n] for n in both]) if both else None
        if ratio is not None:
            low, high = ratio.interval or (1.0, math.inf)
            widths.append(math.sqrt(high / low) - 1)
    return max(widths, default=None)
