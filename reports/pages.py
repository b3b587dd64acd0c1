"""Which tables a report has, and which columns each of them."""

from collections.abc import Sequence

from bench.records.record import Phase
from bench.records.scenario import Scenario
from reports.engines import matrix
from reports.notes import broken_lines, how_measured, plural, shape_text, warnings
from reports.published import checkpoint_cells
from reports.results import PARTS, REFERENCE_METHOD, Measurement, Result, Timing
from reports.table import Block, Column, Heading, Page, Paragraph, Row, Table, bulleted, titled

MEMORY = {
    **{"weights": "Weights", "kv_cache": "KV cache", "activations": "Activations", "rest": "Rest"},
    **{"run_peak": "Run peak", "load_peak": "Load peak", "reserved_peak": "Reserved"},
    **{"nvml_process": "Process (NVML)", "nvml_device": "Device (NVML)"},
}
"""Fields of Memory, without their unit, and the titles of their columns."""

DIVERGENCE = (("KLD mean", "mean"), ("median", "median"), ("99%", "p99"))
"""Titles of columns in nats, and the fields of Divergence behind them."""


def page(found: Sequence[Measurement]) -> Page:
    """The whole report; a heading for each measurement where there are several."""
    several = len(found) > 1
    for measurement in found:
        if several:
            dtypes = " and ".join(measurement.compute_dtypes)
            yield Heading(f"On {measurement.device}{f', computing in {dtypes}' if dtypes else ''}")
        yield from published_page([measurement])
        for title, blocks in _sections(measurement).items():
            yield from [Heading(title, level=int(several)), *blocks] if blocks else []
    yield Paragraph("What the columns mean and how each figure comes about: docs/method.md.")


def _sections(measurement: Measurement) -> dict[str, list[Block]]:
    """What stands under each heading; under those of which nothing is known, nothing."""
    speed, memory = list[Block](), list[Block]()
    for one in measurement.scenarios:
        speed += titled(f"In `{one.name}` ({shape_text(one)}):", speed_table(measurement, one))
        speed += titled(f"In `{one.name}`, prefill time by tokens of the prompt:", length_table(measurement, one))
        memory += titled(f"In `{one.name}`, by what it is for:", memory_table(measurement, one))
    random = all(result.subject.dummy for result in measurement.results)  # random weights have no quality
    return {
        "Speed": speed,
        "Memory": memory,
        "Quality": [] if random else titled("On held-out text:", quality_table(measurement)),
        "Engines": list(matrix(measurement)),
        "Tasks": titled("Scores of lm-eval:", task_table(measurement)),
        "Failures": titled("Runs that did not end well:", failure_table(measurement)),
        "Warnings": bulleted(warnings(measurement)),
        "How it was measured": bulleted(how_measured(measurement)),
    }


def published_page(found: Sequence[Measurement]) -> Page:
    """The published table's columns alone; what is broken is said before."""
    for measurement in found:
        yield from bulleted(broken_lines(measurement))
        yield published_table(measurement)


def published_table(measurement: Measurement) -> Table:
    return Table.of(
        [
            *checkpoint_cells(result.subject, _method_text(result)),
            (Column("Quantized", "share", missing="", optional=True), result.share_below_all),
            (Column(f"{measurement.memory_name} GB", "gigabytes"), measurement.run_peak_bytes(result)),
            (Column("Time", "ratio"), measurement.time(result)),
            (Column("Download"), result.subject.download or result.subject.name),
        ]
        for result in measurement.results
    )


def _method_text(result: Result) -> str:
    """The column Method; the reference says when it did not compute in half precision, a broken row that it is."""
    words = [REFERENCE_METHOD if result.is_reference else result.subject.method]
    words += ["computed in float32"] * (result.is_reference and result.compute_dtype == "float32")
    return ", ".join(words + ["broken"] * (result.broken is not None))


def speed_table(measurement: Measurement, scenario: Scenario) -> Table:
    """One row for each phase and checkpoint, a phase's rows together."""
    phases, timed = PARTS if scenario.decode_steps else PARTS[:1], measurement.timed(scenario)
    return Table.of(_speed_row(measurement, phase, *one) for phase in phases for one in timed)


def _speed_row(measurement: Measurement, phase: Phase, result: Result, timing: Timing) -> Row:
    ratio, decode = timing.ratio(phase), phase == "decode"
    interval = ratio.interval or plural(len(ratio.rounds), "round") if ratio else None
    mode = timing.decode_mode if decode and timing.scenario.mode != "eager" else None
    mode = f"{mode} in {timing.compile_s:.0f} s" if mode and timing.compile_s is not None else mode
    return [
        (Column("Phase"), phase),
        (Column("Row"), measurement.labels[result.subject]),
        (Column("Time", "ratio"), result.ratio_in(timing, phase)),
        (Column("95% interval", "range", missing=""), interval),
        (Column("Spread", "range", missing=""), ratio.spread if ratio else None),
        (Column("Verdict", missing=""), ratio.verdict if ratio else None),
        (Column("Tokens/s", "per_second"), timing.tokens_per_s(phase)),
        (Column("GB/s", "gigabytes", missing="", optional=True), timing.decode_bytes_per_s if decode else None),
        (Column("of copy", "share", missing="", optional=True), measurement.copy_share(timing) if decode else None),
        (Column("Kernel"), ", ".join(filter(None, (timing.kernels.get(phase), mode))) or None),
    ]


def length_table(measurement: Measurement, scenario: Scenario) -> Table:
    """Prefill at each prompt length of a scenario that has several, relative to the reference at that length."""
    timed = [(result, one.prefill_by_length_s) for result, one in measurement.timed(scenario)]
    references = {result.subject.baseline: seconds for result, seconds in timed if result.is_reference}
    columns = [Column(f"{length:,}", "ratio") for length in scenario.lengths]
    return Table.of(
        [
            (Column("Row"), measurement.labels[result.subject]),
            *((column, ours / theirs) for column, ours, theirs in zip(columns, own, reference, strict=True)),
        ]
        for result, own in timed
        if own and (reference := references.get(result.subject.baseline))
    )


def quality_table(measurement: Measurement) -> Table:
    """Perplexity, and how far the next-token distributions are from the reference's."""
    rows, floors = [], []
    for result in measurement.results:
        quality, label = result.quality, measurement.labels[result.subject]
        perplexity, divergence = (quality.perplexity, quality.divergence) if quality else (None, None)
        rows.append((label, perplexity, None if result.loss is None else 1 + result.loss, divergence))
        if quality and quality.noise_floor:
            floors.append((f"{label} against itself", None, None, quality.noise_floor))
    return Table.of(
        [
            (Column("Row"), label),
            (Column("Perplexity", "perplexity"), perplexity),
            (Column("to reference", "ratio"), ratio),
            *((Column(title, "nats", "", optional=True), getattr(one, field, None)) for title, field in DIVERGENCE),
            (Column("Flips", "share", "", optional=True), getattr(one, "flips", None)),
        ]
        for label, perplexity, ratio, one in (*rows, *floors)
    )


def memory_table(measurement: Measurement, scenario: Scenario) -> Table:
    """What the bytes of one scenario's peak are for; the process's and the device's view where NVML told."""
    columns = {f"{field}_bytes": Column(f"{title} GB", "gigabytes", optional=True) for field, title in MEMORY.items()}
    return Table.of(
        [
            (Column("Row"), measurement.labels[result.subject]),
            *((column, getattr(timing.memory, field)) for field, column in columns.items()),
        ]
        for result, timing in measurement.timed(scenario)
        if timing.memory
    )


def task_table(measurement: Measurement) -> Table:
    """One row a checkpoint, one column a task of lm-eval."""
    scores = {one.subject: {score.name: score.value for score in one.tasks} for one in measurement.results if one.tasks}
    names = dict.fromkeys(name for values in scores.values() for name in values)
    return Table.of(
        [(Column("Row"), measurement.labels[subject]), *((Column(name, "share"), values.get(name)) for name in names)]
        for subject, values in scores.items()
    )


def failure_table(measurement: Measurement) -> Table:
    """Every run that did not end well, with its reason; rounds are counted from 1 for the reader."""
    return Table.of(
        [
            (Column("Row"), measurement.labels[result.subject]),
            (Column("Run"), failure.work),
            (Column("Rounds", missing=""), ", ".join(str(number + 1) for number in sorted(failure.rounds)) or None),
            (Column("Status"), failure.status),
            (Column("Reason"), failure.reason),
        ]
        for result in measurement.results
        for failure in result.failures
    )
