"""What the laboratory and the profiler measured, as tables: races, overhead, benchmarks side by side, profiles."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from bench.records.environment import Environment
from bench.records.lab import Operation, OverheadRecord, ProfileRecord, RaceRecord, SideBySideRecord
from bench.records.ratio import Ratio, ratio_of
from reports.table import Block, Bullets, Cell, Column, Page, Paragraph, Table

R = TypeVar("R")

YARDSTICK = "autoawq, repaired"
"""Whom a race's ratios are to."""

OURS = "quantable"
TOLERANCE = 0.05
"""Prefill and decode agree when neither is more than this share away from the other tool's."""

WALL_SHARE = 0.5
"""How much of the other tool's wall time ours may take."""

SHOWN_OPERATIONS = 12
NAME_CHARACTERS = 70
"""Of an operation: templates make names of hundreds."""


def race_page(records: Sequence[RaceRecord]) -> Page:
    """A race of quantizers, a table a model: medians of what ran several times, ratios to the repaired autoawq."""
    return tuple(block for group in _groups(records, lambda one: one.model) for block in _race_of(group))


def _race_of(records: Sequence[RaceRecord]) -> Page:
    entries = {group[0].contender: group for group in _groups(records, lambda one: one.contender)}
    yardstick = _good(entries.get(YARDSTICK, []))
    kinds = list(next((one.divergence for one in records if one.divergence), {}))
    columns = [Column("Quantizer"), Column("Seconds", "count"), Column("to AutoAWQ", "times")]
    columns.append(Column("Peak RSS GB", "gigabytes"))
    for kind in kinds:
        columns += [Column(f"Perplexity ({kind})", "perplexity"), Column(f"KLD ({kind})", "nats")]
        columns.append(Column("to AutoAWQ", "times"))
    rows: list[tuple[Cell, ...]] = []
    for name, found in entries.items():
        good = _good(found)
        if not good:
            rows.append((name, f"did not run: {found[-1].reason}", *[None] * (len(columns) - 2)))
            continue
        seconds = _median(good, lambda one: one.seconds)
        row: list[Cell] = [name, seconds and round(seconds), _times(good, yardstick, lambda one: one.seconds)]
        row.append(_median(good, lambda one: one.peak_bytes))
        for kind in kinds:
            row += [_median(good, _of(kind, "perplexity")), _median(good, _of(kind, "divergence"))]
            row.append(_times(good, yardstick, _of(kind, "divergence")))
        rows.append(tuple(row))
    calibrations = _each_once("{} blocks of {}".format(*one.blocks) for one in records)
    said = (
        f"Quantizing {records[0].model}, {calibrations} calibration tokens, on {_machines(records)}: "
        "one process each, medians of what ran several times. KLD is the mean KL divergence from the reference in nats "
        "a token, on held-out text of the calibration's kind and on another."
    )
    return Table(tuple(columns), tuple(rows)), Paragraph(said)


def overhead_page(records: Sequence[OverheadRecord]) -> Page:
    """Our decode loop over a bare `model.generate`, a row a race."""
    columns = (
        Column("Checkpoint"),
        Column("Prompt", "count"),
        Column("New", "count"),
        Column("Compute dtype"),
        Column("Machine"),
        Column("ms a token, ours", "milliseconds"),
        Column("ms a token, generate", "milliseconds"),
        Column("Ratio", "times"),
        Column("95% interval", "range"),
        Column("Rounds", "count"),
    )
    rows = tuple(
        (
            one.checkpoint,
            one.scenario.prompt_tokens,
            one.scenario.new_tokens,
            one.compute_dtype,
            _machine(one.environment),
            *(statistics.median(one.decode_s_a_token[name]) for name in ("ours", "generate")),
            one.ratio,
            one.interval and "{:.3f} to {:.3f}".format(*one.interval),
            len(one.decode_s_a_token["ours"]),
        )
        for one in records
    )
    said = "Decoding in turns in one process: our timed loop over a bare `generate`. Below x1 ours takes less."
    return Table(columns, rows), Paragraph(said)


def side_by_side_page(records: Sequence[SideBySideRecord]) -> Page:
    """Our bench beside optimum-benchmark, a table a workload: medians, our ratio to each, what they agree in."""
    groups = _groups(records, lambda one: (one.content_sha256, one.prompt, one.new))
    return tuple(block for group in groups for block in _side_by_side_of(group))


def _side_by_side_of(records: Sequence[SideBySideRecord]) -> Page:
    names = list(dict.fromkeys(record.contender for record in records))
    columns = [Column("Benchmark")]
    for title in FIGURES:
        columns += [Column(title, "per_second"), Column("ours / it", "ratio", ""), Column("Rounds", "range", "")]
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        ran = _good_of(records, name)
        if not ran:
            reason = next(one.reason for one in records if one.contender == name)
            rows.append((name, f"could not run: {reason}", *[None] * (len(columns) - 2)))
            continue
        row: list[Cell] = [name]
        for figure, samples in FIGURES.items():
            ratio = None if name == OURS else ours_over(records, name, figure)
            row.append(statistics.median(sample for one in ran for sample in samples(one)))
            row += [ratio.value if ratio else None, ratio.spread if ratio else None]
        rows.append(tuple(row))
    first = records[0]
    said = (
        f"{first.model} in float32, {first.prompt} prompt tokens and {first.new} new, on "
        f"{_machines(records)}: whole processes in alternating order. Seconds are of a prompt pass, of a "
        "decoded token, and of the whole process; Rounds is the smallest and the largest ratio of one round."
    )
    blocks: list[Block] = [Table(tuple(columns), tuple(rows))]
    found = [line for name in names if name != OURS for line in findings(records, name)]
    return (*blocks, *((Bullets(tuple(found)),) if found else ()), Paragraph(said))


FIGURES: dict[str, Callable[[SideBySideRecord], list[float]]] = {
    "prefill s": lambda one: list(one.prefill_s),
    "decode s a token": lambda one: one.steps_s,
    "wall s": lambda one: [one.wall_s],
}
"""The samples of each compared figure, by its title."""


def ours_over(records: Iterable[SideBySideRecord], name: str, figure: str) -> Ratio | None:
    """Our seconds over a contender's, round by round (each round's median); None where no round has both."""
    samples, records = FIGURES[figure], list(records)
    mine, other = ({one.round: samples(one) for one in _good_of(records, who)} for who in (OURS, name))
    both = sorted(number for number in mine.keys() & other.keys() if mine[number] and other[number])
    if not both:
        return None
    return ratio_of([statistics.median(mine[n]) for n in both], [statistics.median(other[n]) for n in both])


def findings(records: Sequence[SideBySideRecord], name: str) -> list[str]:
    """In words: whether we are within the tolerance of another tool, how long we take, what its report is made of."""
    lines = []
    for figure in FIGURES:
        ratio = ours_over(records, name, figure)
        if ratio is None:
            continue
        wall = figure == "wall s"
        agree = ratio.value <= WALL_SHARE if wall else abs(ratio.value - 1) <= TOLERANCE
        what = f"at most {WALL_SHARE:g} of" if wall else f"within {TOLERANCE:.0%} of"
        lines.append(f"{figure}: {'' if agree else 'not '}{what} {name} (x{ratio.value:.3f}).")
    ran = [one for one in _good_of(records, name) if one.raw and "launcher_cpu_s" in one.raw]
    if ran:
        cpu_s = statistics.median(one.raw["launcher_cpu_s"] for one in ran if one.raw)
        lines.append(f"{name}: its launching process used {cpu_s:.1f} processor seconds while it only waited.")
        per_token, steps = (ran[-1].raw or {})["latency"]["per_token"], ran[-1].steps_s
        lines.append(
            f"{name}: its per_token says p50 {per_token['p50']:.4f}, mean {per_token['mean']:.4f} s from "
            f"{per_token['count']} values; the {len(steps)} decode steps behind them have median "
            f"{statistics.median(steps):.4f}, mean {statistics.mean(steps):.4f} s."
        )
    return lines


def profile_page(records: Sequence[ProfileRecord]) -> Page:
    """Where the time of each phase goes: the longest operations of a pass, the rest in one row."""
    blocks: list[Block] = []
    for one in records:
        named = f"{one.source}, {one.variant}" if one.variant else one.source
        times = f"{one.wall_s * 1e3:.2f} ms, of which busy {one.busy_s * 1e3:.2f} ms"
        blocks.append(Paragraph(f"{named}, {one.phase}: {times}, on {_machine(one.environment)}."))
        rest = one.operations[SHOWN_OPERATIONS:]
        shown = [*one.operations[:SHOWN_OPERATIONS]]
        if rest:
            totals = sum(other.calls for other in rest), sum(other.seconds for other in rest)
            shown.append(Operation(f"{len(rest)} others", *totals))
        columns = (
            Column("ms", "milliseconds"),
            Column("Share", "share"),
            Column("Calls", "calls"),
            Column("Operation"),
        )
        rows = tuple(
            (op.seconds, op.seconds / one.busy_s if one.busy_s else None, op.calls, op.name[:NAME_CHARACTERS])
            for op in shown
        )
        blocks.append(Table(columns, rows))
    return tuple(blocks)


def _machine(environment: Environment) -> str:
    return environment.gpu or environment.cpu or "an unknown machine"


def _machines(records: Iterable[RaceRecord | SideBySideRecord]) -> str:
    return _each_once(_machine(one.environment) for one in records)


def _each_once(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def _groups(records: Iterable[R], key: Callable[[R], Hashable]) -> list[list[R]]:
    """The records that share a key, in the order first met: those of different ones stand in no table together."""
    groups: dict[Hashable, list[R]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _good(entries: Iterable[RaceRecord]) -> list[RaceRecord]:
    return [one for one in entries if one.reason is None]


def _good_of(records: Iterable[SideBySideRecord], name: str) -> list[SideBySideRecord]:
    """The runs of a contender that have figures, in the order of the rounds."""
    return [one for one in records if one.contender == name and one.reason is None]


def _of(kind: str, field: str) -> Callable[[RaceRecord], float | None]:
    return lambda one: (getattr(one, field) or {}).get(kind)


def _median(entries: Iterable[RaceRecord], value: Callable[[RaceRecord], float | None]) -> float | None:
    found = [figure for one in entries if (figure := value(one)) is not None]
    return statistics.median(found) if found else None


def _times(
    entries: Sequence[RaceRecord], yardstick: Sequence[RaceRecord], value: Callable[[RaceRecord], float | None]
) -> float | None:
    own, other = _median(entries, value), _median(yardstick, value)
    return own / other if own is not None and other else None
