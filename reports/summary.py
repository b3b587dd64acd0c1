"""The answer on one screen: a row a variant, what it needs, how fast it is, what it loses, and which one to take."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import le
from statistics import fmean

from bench.records.comparison import grouped
from bench.records.ratio import Verdict
from bench.records.record import Phase
from reports.notes import broken_lines, dummy_text, joined, plural, setting_text, shape_text, warnings
from reports.results import PARTS, Measurement, Result
from reports.table import Cell, Column, Heading, Page, Paragraph, Row, Table, bulleted, per_second_text

MARKS: dict[Verdict, str] = {"faster": "▲", "slower": "▼", "same within noise": "≈", "unsure": "?"}
LIBRARIES = ("torch", "transformers", "autoawq", "bitsandbytes")  # whose versions the figures depend on most
SHOWN_REMARKS = 4


@dataclass(frozen=True)
class Standing:
    """One line of the summary: a checkpoint, or several with the same codes on the same kernels.

    name, first: as shown; the first of the checkpoints; peak_bytes: while running, the most of them.
    speeds:     tokens a second in each phase that was measured, the mean of them.
    marks:      how each speed compares with the reference's; unsure where they differ.
    loss:       perplexity over the reference's, less 1; 0 for the reference."""

    name: str
    first: Result
    peak_bytes: int | None
    speeds: dict[Phase, float]
    marks: dict[Phase, Verdict]
    loss: float | None

    @property
    def costs(self) -> tuple[float, ...]:
        """Peak memory, loss, and each speed below zero; without one that is not known."""
        known = [one for one in (self.peak_bytes, self.loss) if one is not None]
        return (*known, *(-speed for speed in self.speeds.values()))


def beaten(rows: Sequence[Standing]) -> dict[str, str]:
    """The rows that another one beats, dearer in nothing and cheaper in something, and such a one that none beats."""
    found, best = {}, dict[tuple[float, ...], Standing]()
    most = max((2 + len(one.speeds) for one in rows), default=0)  # costs that are all known
    for row in sorted((one for one in rows if len(one.costs) == most), key=lambda one: one.costs):
        better = next((one for costs, one in best.items() if all(map(le, costs, row.costs))), None)
        if better is None:
            best[row.costs] = row
        elif better.costs != row.costs:
            found[row.name] = better.name
    return found


def standings(measurement: Measurement) -> list[Standing]:
    """The lines, in the order of the rows; a broken row has none, since nothing of it ranks."""
    found = []
    for results in grouped((one for one in measurement.results if not one.broken), _codes).values():
        speeds: dict[Phase, float] = {}
        marks: dict[Phase, Verdict] = {}
        for phase in PARTS:
            timings = [timing for one in results if (timing := one.timing(measurement.scenario_of(phase)))]
            if known := [speed for timing in timings if (speed := timing.tokens_per_s(phase))]:
                speeds[phase] = fmean(known)
            if verdicts := {ratio.verdict for timing in timings if (ratio := timing.ratio(phase))}:
                marks[phase] = verdicts.pop() if len(verdicts) == 1 else "unsure"
        name, first = joined([measurement.labels[one.subject] for one in results]), results[0]
        peak_bytes = max((peak for one in results if (peak := measurement.run_peak_bytes(one))), default=None)
        found.append(Standing(name, first, peak_bytes, speeds, marks, first.loss))
    return found


def _codes(result: Result) -> tuple[object, ...]:
    """Equal for rows with the same codes that ran on the same kernels: layouts of one quantization."""
    subject, quality = result.subject, result.quality
    kernels = tuple((one.scenario, *one.kernels.values()) for one in result.timings.values())
    if subject.version is None or quality is None or not kernels:
        return (subject,)
    named = subject.base_model, subject.method, subject.q_group_size, subject.rounding, subject.kernel
    return (*named, quality.perplexity, kernels)


def summary(found: Sequence[Measurement]) -> Page:
    """One screen a measurement: with five variants 80 columns wide and less than 40 lines long."""
    for measurement in found:
        models = " and ".join(dict.fromkeys(one.subject.base_model for one in measurement.results))
        yield Heading(f"{models} on {setting_text(measurement)}")
        yield from bulleted(broken_lines(measurement))
        rows = standings(measurement)
        yield Table.of(_row(measurement, row) for row in rows)
        yield from bulleted((*advice(rows), *_remarks(measurement)))
        yield Paragraph(_legend(measurement))


def _row(measurement: Measurement, row: Standing) -> Row:
    first, change = row.first, "" if row.first.is_reference and row.loss is not None else row.loss
    return [
        (Column("Variant"), row.name),
        (Column("Weights GB", "gigabytes"), first.weights_bytes),
        (Column(f"Peak {measurement.memory_name} GB", "gigabytes", optional=True), row.peak_bytes),
        (Column("Prefill tokens/s", "per_second", optional=True), marked(row, "prefill")),
        (Column("Decode tokens/s", "per_second", optional=True), marked(row, "decode")),
        (Column("PPL change", "change", optional=True), change),
        (Column("KLD", "nats", "", optional=True), first.mean_divergence),
        (Column("Quantized", "share", "", optional=True), first.share_below_all),
    ]


def marked(row: Standing, phase: Phase) -> Cell:
    speed, mark = row.speeds.get(phase), row.marks.get(phase)
    return None if speed is None else f"{MARKS[mark] if mark else ''} {per_second_text(speed)}"


def advice(rows: Sequence[Standing]) -> tuple[str, ...]:
    """Two lines a base model: the fastest and the one that loses least; then those that another one beats."""
    lines: list[str] = []
    for same in grouped(rows, lambda one: one.first.subject.baseline).values():
        references, ranked = ([row for row in same if row.first.is_reference is wanted] for wanted in (True, False))
        said = [line for phase in ("decode", "prefill") if (line := _fastest(references, ranked, phase))][:1]
        if known := [row for row in ranked if row.loss is not None]:
            least = min(known, key=lambda row: row.loss or 0.0)
            said.append(f"Least loss: {least.name} ({_loss_text(least)}).")
        lines += [" ".join(said)] if said else []
        found = beaten(same)
        worse = [row.name for row in ranked if row.name in found]
        lines += [f"{found[name]} beats {name} in memory, speed and loss." for name in worse]
    return tuple(lines)


def _fastest(references: Sequence[Standing], ranked: Sequence[Standing], phase: Phase) -> str | None:
    timed = [row for row in ranked if phase in row.speeds]
    if not timed or not references or phase not in references[0].speeds:
        return None
    best, what = max(timed, key=lambda row: row.speeds[phase]), "decoding" if phase == "decode" else "prefill"
    if best.marks.get(phase) != "faster":
        return f"No variant is surely faster than FP16 in {what}."
    times = best.speeds[phase] / references[0].speeds[phase]
    return f"Fastest in {what}: {best.name} ({times:.1f} times FP16's tokens/s, {_loss_text(best)})."


def _loss_text(row: Standing) -> str:
    return "loss unknown" if row.loss is None else f"perplexity {row.loss:+.1%}"


def _remarks(measurement: Measurement) -> tuple[str, ...]:
    found = [(measurement.labels[row.subject], one) for row in measurement.results for one in row.failures]
    failed = [f"{label}, {one.work}: {one.status}, {one.reason}" for label, one in found]
    more = [f"{len(failed)} failures in all."] if failed[SHOWN_REMARKS:] else []
    if warned := list(warnings(measurement)):
        more.append(f"`--full` has {plural(len(warned), 'warning')}.")
    return (*failed[:SHOWN_REMARKS], *more)


def _legend(measurement: Measurement) -> str:
    first, decoding = map(measurement.scenario_of, PARTS)
    said = [f"Prefill in `{first.name}` ({shape_text(first)})"] if first else []
    said += [f"decode in `{decoding.name}` ({shape_text(decoding)})"] if decoding and decoding != first else []
    libraries = measurement.environment.libraries
    versions = ", ".join(f"{name} {libraries[name]}" for name in LIBRARIES if libraries.get(name))
    marks = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    told = (", ".join(said), f"Beside FP16: {marks}", versions, dummy_text(measurement).removesuffix("."))
    return " ".join(f"{one}." for one in told if one)
