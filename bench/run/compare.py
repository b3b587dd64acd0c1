"""Two record files of the same checkpoints side by side: what changed between them. Imports no torch."""

from collections.abc import Sequence

from bench.records.environment import differences
from bench.records.phase import PHASES, Phase, phase_s
from bench.records.ratio import Ratio, ratio_of
from bench.records.record import Record, latency_records
from bench.records.scenario import Scenario
from quantize.errors import UserError

Key = tuple[str, Scenario]


def comparison_lines(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """One line for each checkpoint, scenario and phase that both hold: the second's seconds over the first's.

    The two were measured apart, so a machine that drifted in between is in the ratio. Raises UserError, naming the
    field, when they were not measured alike, and when they have no run in common.
    """
    check_comparable(before, after)
    ours, theirs = _seconds(before), _seconds(after)
    lines = []
    for key in ours.keys() & theirs.keys():
        name, scenario = key
        for phase in PHASES:
            ratio = _ratio(ours[key], theirs[key], phase)
            if ratio is not None:
                interval = "" if ratio.interval is None else f" ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})"
                lines.append(f"{name}, {scenario.name}, {phase}: x{ratio.value:.2f}{interval}, {ratio.verdict}")
    if not lines:
        raise UserError("the two files have no checkpoint and scenario in common: nothing to compare")
    return [*sorted(lines), "The second file's time over the first's; what the machine did in between is in it."]


def check_comparable(before: Sequence[Record], after: Sequence[Record]) -> None:
    """Raises UserError, naming the field, for two series that were not measured alike."""
    good = [[record for record in records if record.status == "ok"] for records in (before, after)]
    for one, other in zip(*(records[:1] for records in good), strict=False):
        found = differences(one.environment, other.environment)
        if found:
            raise UserError(f"the two files were not measured alike ({found[0]}): compare runs of one machine")
    known = {(record.subject.name, record.scenario): record for record in good[0]}
    for record in good[1]:
        first = known.get((record.subject.name, record.scenario))
        if first is None or first.kind != record.kind:
            continue
        for field in ("device", "compute_dtype", "prompt_sha256"):
            one_value, other_value = getattr(first, field), getattr(record, field)
            if None not in (one_value, other_value) and one_value != other_value:
                raise UserError(
                    f"{record.subject.name} was not measured alike in the two files ({field}: {one_value} against "
                    f"{other_value}): measure again"
                )


def _seconds(records: Sequence[Record]) -> dict[Key, list[Record]]:
    found: dict[Key, list[Record]] = {}
    for record in latency_records(records):
        if record.scenario is not None:
            found.setdefault((record.subject.name, record.scenario), []).append(record)
    return found


def _ratio(before: Sequence[Record], after: Sequence[Record], phase: Phase) -> Ratio | None:
    series = [
        [spent for record in records if (spent := phase_s(record, phase)) is not None] for records in (before, after)
    ]
    count = min(map(len, series))
    return ratio_of(series[1][:count], series[0][:count]) if count else None
