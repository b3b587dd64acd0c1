"""What the laboratory measured, as tables: races, overhead, benchmarks, architectures, profiles, crossovers.

`python -m tests.lab.pages FILE` prints the page of a file of its records; --out writes it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.records.comparison import grouped
from bench.records.environment import Environment
from bench.records.ratio import Ratio, ratio_of
from quantize.errors import UserError
from quantize.files import write_whole
from quantize.shell import guarded
from quantize.variant import VARIANTS
from reports.api import check_not_ours
from reports.markdown import markdown
from reports.results import median_of
from reports.table import Bullets, Cell, Column, Page, Paragraph, Row, Table, bulleted
from tests.lab.crossover.page import crossover_page
from tests.lab.records import (
    ArchitectureRecord,
    CrossoverEntry,
    LabRecord,
    Operation,
    OverheadRecord,
    ProfileRecord,
    RaceRecord,
    SideBySideRecord,
    VariantOutcome,
    read_lab,
)

Runs = Sequence[RaceRecord]

OURS, YARDSTICK = "quantable", "autoawq, repaired"  # to the latter are a race's ratios
TOLERANCE = 0.05  # how far prefill and decode may be from the other tool's to agree
WALL_SHARE = 0.5  # how much of its wall time ours may take


def race_page(records: Runs) -> Page:
    """A race of quantizers, a table a model: medians of what ran several times, ratios to the repaired autoawq."""
    for model, same in grouped(records, lambda one: one.model).items():
        entries = grouped(same, lambda one: one.contender)
        kinds = list(next((one.divergence for one in same if one.divergence), {}))
        yield Table.of(_race_row(name, runs, entries.get(YARDSTICK, []), kinds) for name, runs in entries.items())
        calibrations = " and ".join(dict.fromkeys("{} blocks of {}".format(*one.blocks) for one in same))
        yield Paragraph(
            f"Quantizing {model}, {calibrations} calibration tokens, on {_machines(same)}: one process each, medians "
            "of what ran several times. KLD is the mean KL divergence from the reference in nats a token, on held-out "
            "text of the calibration's kind and on another."
        )


def _race_row(name: str, runs: Runs, yardstick: Runs, kinds: Sequence[str]) -> Row:
    failed, seconds = all(one.reason is not None for one in runs), _middle(runs, "seconds")
    row: list[tuple[Column, Cell]] = [
        (Column("Quantizer"), name),
        (Column("Seconds", "count"), f"did not run: {runs[-1].reason}" if failed else seconds and round(seconds)),
        (Column("to AutoAWQ", "times"), _times(runs, yardstick, "seconds")),
        (Column("Peak RSS GB", "gigabytes"), _middle(runs, "peak_bytes")),
    ]
    for kind in kinds:
        row += [
            (Column(f"Perplexity ({kind})", "perplexity"), _middle(runs, "perplexity", kind)),
            (Column(f"KLD ({kind})", "nats"), _middle(runs, "divergence", kind)),
            (Column("to AutoAWQ", "times"), _times(runs, yardstick, "divergence", kind)),
        ]
    return row


def _middle(runs: Runs, field: str, kind: str | None = None) -> float | None:
    """The median of a field over the runs that ended well; of one kind of text where it has a figure for each."""
    values = [getattr(one, field) for one in runs if one.reason is None]
    return median_of(value if kind is None else (value or {}).get(kind) for value in values)


def _times(runs: Runs, yardstick: Runs, field: str, kind: str | None = None) -> float | None:
    own, other = _middle(runs, field, kind), _middle(yardstick, field, kind)
    return own / other if own is not None and other else None


def overhead_page(records: Sequence[OverheadRecord]) -> Page:
    """Our decode loop over a bare `model.generate`, a row a race."""
    yield Table.of(
        [
            (Column("Checkpoint"), one.checkpoint),
            (Column("Prompt", "count"), one.scenario.prompt_tokens),
            (Column("New", "count"), one.scenario.new_tokens),
            (Column("Compute dtype"), one.compute_dtype),
            (Column("Machine"), _machine(one.environment)),
            (Column("ms a token, ours", "milliseconds"), statistics.median(one.decode_s_a_token["ours"])),
            (Column("ms a token, generate", "milliseconds"), statistics.median(one.decode_s_a_token["generate"])),
            (Column("Ratio", "times"), one.ratio),
            (Column("95% interval", "range"), one.interval and "{:.3f} to {:.3f}".format(*one.interval)),
            (Column("Rounds", "count"), len(one.decode_s_a_token["ours"])),
        ]
        for one in records
    )
    said = "Decoding in turns in one process: our timed loop over a bare `generate`. Below x1 ours takes less."
    yield Paragraph(said)


def side_by_side_page(records: Sequence[SideBySideRecord]) -> Page:
    """Our bench beside optimum-benchmark, a table a workload: medians, our ratio to each, what they agree in."""
    for same in grouped(records, lambda one: (one.content_sha256, one.prompt, one.new)).values():
        names, first = dict.fromkeys(one.contender for one in same), same[0]
        yield Table.of(_side_by_side_row(same, name) for name in names)
        yield from bulleted(line for name in names if name != OURS for line in findings(same, name))
        yield Paragraph(
            f"{first.model} in float32, {first.prompt} prompt tokens and {first.new} new, on {_machines(same)}: whole "
            "processes in alternating order. Seconds are of a prompt pass, of a decoded token, and of the whole "
            "process; Rounds is the smallest and the largest ratio of one round."
        )


def _side_by_side_row(records: Sequence[SideBySideRecord], name: str) -> Row:
    ran = _good_of(records, name)
    row: list[tuple[Column, Cell]] = [(Column("Benchmark"), name)]
    for figure, samples in FIGURES.items():
        ratio = None if name == OURS else ours_over(records, name, figure)
        row += [
            (Column(figure, "per_second"), median_of(sample for one in ran for sample in samples(one))),
            (Column("ours / it", "ratio", ""), ratio.value if ratio else None),
            (Column("Rounds", "range", ""), ratio.spread if ratio else None),
        ]
    if not ran:
        reason = next(one.reason for one in records if one.contender == name)
        row[1] = (row[1][0], f"could not run: {reason}")
    return row


FIGURES: dict[str, Callable[[SideBySideRecord], list[float]]] = {
    "prefill s": lambda one: list(one.prefill_s),
    "decode s a token": lambda one: one.steps_s,
    "wall s": lambda one: [one.wall_s],
}


def ours_over(records: Iterable[SideBySideRecord], name: str, figure: str) -> Ratio | None:
    """Our seconds over a contender's, round by round (each round's median); None where no round has both."""
    samples, records = FIGURES[figure], list(records)
    mine, other = ({one.round: samples(one) for one in _good_of(records, who)} for who in (OURS, name))
    both = sorted(number for number in mine.keys() & other.keys() if mine[number] and other[number])
    first, second = ([statistics.median(found[number]) for number in both] for found in (mine, other))
    return ratio_of(first, second) if both else None


def findings(records: Sequence[SideBySideRecord], name: str) -> list[str]:
    """In words: whether we are within the tolerance of another tool, how long we take, what its report is made of."""
    lines = []
    for figure in FIGURES:
        if ratio := ours_over(records, name, figure):
            wall = figure == "wall s"
            agree = ratio.value <= WALL_SHARE if wall else abs(ratio.value - 1) <= TOLERANCE
            what = f"at most {WALL_SHARE:g} of" if wall else f"within {TOLERANCE:.0%} of"
            lines.append(f"{figure}: {'' if agree else 'not '}{what} {name} (x{ratio.value:.3f}).")
    if ran := [(one.steps_s, said) for one in _good_of(records, name) if (said := one.launched) and one.steps_s]:
        cpu_s = statistics.median(said["cpu_s"] for _, said in ran)
        lines.append(f"{name}: its launching process used {cpu_s:.1f} processor seconds while it only waited.")
        steps, per_token = ran[-1]
        theirs = "p50 {p50:.4f}, mean {mean:.4f} s from {count} values".format(**per_token)
        ours = f"median {statistics.median(steps):.4f}, mean {statistics.mean(steps):.4f} s"
        lines.append(f"{name}: its per_token says {theirs}; the {len(steps)} decode steps behind them have {ours}.")
    return lines


def architecture_page(records: Sequence[ArchitectureRecord]) -> Page:
    """What became of every architecture, a row each: the latest record counts."""
    latest, none = {one.architecture: one for one in records}, VariantOutcome()
    ran = [one for one in latest.values() if one.variants]
    yield Table.of(
        [
            (Column("Architecture"), one.architecture),
            (Column("Class"), one.model_class or None),
            (Column("Reached", "share"), one.reached),
            (Column("Groups", "count"), len(one.groups)),
            (Column("In no group", "count"), one.ungrouped),
            (Column("Moved", "error"), one.moved_error),
            (Column("Kernel", "error"), awq.kernel_error),
            *(
                (Column(f"Error {name}", "error", optional=True), one.variants.get(name, none).error)
                for name in VARIANTS
            ),
            (Column("Elsewhere", "error"), awq.engine_error),
            (Column("Engine"), awq.engine),
            (Column("Why not"), one.reason),
        ]
        for one, awq in ((one, one.variants.get("awq-gemm", none)) for one in latest.values())
    )
    yield Paragraph(
        f"{len(ran)} architectures, tried on small random models. Reached is how much of the decoder layers' weights, "
        "routers aside, AWQ quantizes, Moved how much the logits change when random scales go through all groups, "
        "Kernel how far they are from those of the dequantized weights, Elsewhere how far those of another engine are, "
        "and Error how far from those of the source, all relative. Kernel has the experts kept that the dequantized "
        "weights choose: a rounding error sends a token that stands between two experts to the other one."
    )
    yield Paragraph("Where scales move:")
    yield Bullets(tuple(f"{one.architecture}: {'; '.join(one.groups) or 'none'}" for one in ran))
    yield Paragraph("Refused:")
    found = [(one.architecture, *variant) for one in ran for variant in one.variants.items()]
    reasons = [f"{name}, {variant}: {one.reason}" for name, variant, one in found if one.reason]
    reasons += [f"{name} in {one.engine}: {one.engine_reason}" for name, _, one in found if one.engine_reason]
    yield Bullets(tuple(reasons))


SHOWN_OPERATIONS, NAME_CHARACTERS = 12, 70  # a profile's rows; templates make names of hundreds of characters


def profile_page(records: Sequence[ProfileRecord]) -> Page:
    """Where the time of each phase goes: the longest operations of a pass, the rest in one row."""
    for one in records:
        named = f"{one.source}, {one.variant}" if one.variant else one.source
        times = f"{one.wall_s * 1e3:.2f} ms, of which busy {one.busy_s * 1e3:.2f} ms"
        yield Paragraph(f"{named}, {one.phase}: {times}, on {_machine(one.environment)}.")
        shown, rest = [*one.operations[:SHOWN_OPERATIONS]], one.operations[SHOWN_OPERATIONS:]
        if rest:
            calls, seconds = sum(other.calls for other in rest), sum(other.seconds for other in rest)
            shown.append(Operation(f"{len(rest)} others", calls, seconds))
        yield Table.of(
            [
                (Column("ms", "milliseconds"), op.seconds),
                (Column("Share", "share"), op.seconds / one.busy_s if one.busy_s else None),
                (Column("Calls", "calls"), op.calls),
                (Column("Operation"), op.name[:NAME_CHARACTERS]),
            ]
            for op in shown
        )


def _machine(environment: Environment) -> str:
    return environment.gpu or environment.cpu or "an unknown machine"


def _machines(records: Iterable[RaceRecord | SideBySideRecord]) -> str:
    return " and ".join(dict.fromkeys(_machine(one.environment) for one in records))


def _good_of(records: Iterable[SideBySideRecord], name: str) -> list[SideBySideRecord]:
    """The runs of a contender that have figures, in the order of the rounds."""
    return [one for one in records if one.contender == name and one.reason is None]


PAGES: dict[type[LabRecord], Callable[[Sequence[Any]], Page]] = {
    RaceRecord: race_page,
    OverheadRecord: overhead_page,
    SideBySideRecord: side_by_side_page,
    ArchitectureRecord: architecture_page,
    ProfileRecord: profile_page,
    CrossoverEntry: crossover_page,
}


def lab_page(path: Path) -> str:
    """The page of a file of records as markdown. Raises UserError as `read_lab` does, and for a file without any."""
    records = read_lab(path)
    if not records:
        raise UserError(f"{path} holds no records: run what makes them first")
    return markdown(PAGES[type(records[0])](records))


def show(arguments: argparse.Namespace) -> None:
    """Print the page, or write it."""
    text = lab_page(arguments.file)
    if arguments.out is None:
        print(text, end="")
    else:
        check_not_ours(arguments.out)
        write_whole(arguments.out, text.encode())
        print(f"wrote {arguments.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write a page; return the exit code: 0, or 2 for a file that is none of the laboratory's."""
    cli = argparse.ArgumentParser(prog="pages", description=__doc__)
    cli.add_argument("file", type=Path, metavar="FILE", help="a file of one kind of the laboratory's records")
    cli.add_argument("--out", type=Path, metavar="FILE", help="write there instead of the screen")
    return guarded("pages", lambda: show(cli.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
