"""Which tables a report has, and which columns each of them."""

from collections.abc import Iterator, Sequence

from bench.records.record import Divergence, Phase
from bench.records.scenario import Scenario
from reports.notes import broken_lines, paragraph, shape_text, warnings
from reports.published import checkpoint_cells
from reports.results import REFERENCE_METHOD, Measurement, Result, Timing
from reports.table import Block, Bullets, Column, Heading, Page, Paragraph, Row, Table, titled

MEMORY_COLUMNS = {
    Column(f"{title} GB", "gigabytes", optional=True): f"{field}_bytes"
    for title, field in (
        ("Weights", "weights"), ("KV cache", "kv_cache"), ("Activations", "activations"), ("Rest", "rest"),
        ("Run peak", "run_peak"), ("Load peak", "load_peak"), ("Reserved", "reserved_peak"),
        ("Process (NVML)", "nvml_process"), ("Device (NVML)", "nvml_device"),
    )
}  # fmt: skip
"""The memory table's columns, and the fields of Memory behind them."""

DIVERGENCE_COLUMNS = {
    Column("KLD mean", "nats", missing="", optional=True): "mean",
    Column("median", "nats", missing="", optional=True): "median",
    Column("99%", "nats", missing="", optional=True): "p99",
    Column("Flips", "share", missing="", optional=True): "flips",
}
"""The quality table's, and the fields of Divergence behind them."""


def page(found: Sequence[Measurement]) -> Page:
    """The whole report; a heading for each measurement where there are several."""
    blocks: list[Block] = []
    for measurement in found:
        if len(found) > 1:
            dtypes = " and ".join(measurement.compute_dtypes)
            blocks.append(Heading(f"On {measurement.device}{f', computing in {dtypes}' if dtypes else ''}"))
        blocks += _blocks(measurement)
    return tuple(blocks)


def _blocks(measurement: Measurement) -> Iterator[Block]:
    if broken := broken_lines(measurement):
        yield Bullets(broken)
    yield published_table(measurement)
    for scenario in measurement.scenarios:
        name = f"`{scenario.name}`"
        speed = speed_table(measurement, scenario)
        yield from titled(f"Speed in the scenario {name} ({shape_text(scenario)}):", speed)
        lengths = length_table(measurement, scenario)
        yield from titled(f"Prefill time in {name} by tokens of the prompt:", lengths)
    for scenario in measurement.scenarios:
        memory = memory_table(measurement, scenario)
        yield from titled(f"Memory in the scenario `{scenario.name}`, by what it is for:", memory)
    if not all(result.subject.dummy for result in measurement.results):  # random weights have no quality
        yield from titled("Quality:", quality_table(measurement))
    yield from titled("Tasks (lm-eval):", task_table(measurement))
    yield from titled("Runs that did not end well:", failure_table(measurement))
    if warned := warnings(measurement):
        yield Bullets(warned)
    yield Paragraph(paragraph(measurement))


def published_page(found: Sequence[Measurement]) -> Page:
    """The published table's columns alone; what is broken is said before."""
    blocks: list[Block] = []
    for measurement in found:
        broken = broken_lines(measurement)
        blocks += [*([Bullets(broken)] if broken else []), published_table(measurement)]
    return tuple(blocks)


def published_table(measurement: Measurement) -> Table:
    """The columns of the published table, in its order."""
    memory = "RAM GB" if measurement.memory_is_ram else "VRAM GB"
    return Table.of(
        [
            *checkpoint_cells(result.subject, method_text(result)),
            (Column("Quantized", "share", missing="", optional=True), _share_below_all(result)),
            (Column(memory, "gigabytes"), measurement.run_peak_bytes(result)),
            (Column("Time", "ratio"), measurement.time(result)),
            (Column("Download"), result.subject.download or result.subject.name),
        ]
        for result in measurement.results
    )


def method_text(result: Result) -> str:
    """The column Method; the reference says when it did not compute in half precision, a broken row that it is."""
    words = [REFERENCE_METHOD if result.is_reference else result.subject.method]
    words += ["computed in float32"] * (result.is_reference and result.compute_dtype == "float32")
    return ", ".join(words + ["broken"] * (result.broken is not None))


def _share_below_all(result: Result) -> float | None:
    """How much of the decoder's matrices is quantized, where that is not all of it."""
    share = result.quantized_share
    return share if share is not None and share < 0.9995 else None


def _timed(measurement: Measurement, scenario: Scenario) -> list[tuple[Result, Timing]]:
    """The rows that ran in this scenario."""
    return [(result, timing) for result in measurement.results if (timing := result.timing(scenario)) is not None]


def speed_table(measurement: Measurement, scenario: Scenario) -> Table:
    """One row for each phase and checkpoint, a phase's rows together; GB/s are of what a decode step reads."""
    phases: tuple[Phase, ...] = ("prefill", "decode") if scenario.decode_steps else ("prefill",)
    rows = _timed(measurement, scenario)
    return Table.of(_speed_row(phase, measurement, result, timing) for phase in phases for result, timing in rows)


def _speed_row(phase: Phase, measurement: Measurement, result: Result, timing: Timing) -> Row:
    ratio, decode = timing.ratio(phase), phase == "decode"
    rounds = len(ratio.rounds) if ratio else 0
    interval = ratio.interval or f"{rounds} round{'s' if rounds > 1 else ''}" if ratio else None
    kernels = timing.decode_kernels if decode else timing.prefill_kernels
    modes = timing.decode_modes if decode and timing.scenario.mode == "graph" else ()
    tokens_per_s = timing.decode_tokens_per_s if decode else timing.prefill_tokens_per_s
    return [
        (Column("Phase"), phase),
        (Column("Row"), measurement.labels[result.subject]),
        (Column("Time", "ratio"), result.ratio_in(timing, phase)),
        (Column("95% interval", "range", missing=""), interval),
        (Column("Spread", "range", missing=""), ratio.spread if ratio else None),
        (Column("Verdict", missing=""), ratio.verdict if ratio else None),
        (Column("Tokens/s", "per_second"), tokens_per_s),
        (Column("GB/s", "gigabytes", missing="", optional=True), timing.decode_bytes_per_s if decode else None),
        (Column("of copy", "share", missing="", optional=True), measurement.copy_share(timing) if decode else None),
        (Column("Kernel"), ", ".join(" / ".join(names) for names in (kernels, modes) if names) or None),
    ]


def length_table(measurement: Measurement, scenario: Scenario) -> Table:
    """Prefill at each prompt length of a scenario that has several, relative to the reference at that length."""
    timed = [(result, one.prefill_by_length_s) for result, one in _timed(measurement, scenario)]
    references = {result.subject.baseline: own for result, own in timed if result.is_reference}
    columns = [Column(f"{length:,}", "ratio") for length in scenario.lengths]
    rows = [
        (result, [ours / theirs for ours, theirs in zip(own, reference, strict=True)])
        for result, own in timed
        if own and (reference := references.get(result.subject.baseline))
    ]
    return Table.of(
        [(Column("Row"), measurement.labels[result.subject]), *zip(columns, ratios, strict=True)]
        for result, ratios in rows
    )


def quality_table(measurement: Measurement) -> Table:
    """Perplexity, and how far the next-token distributions are from the reference's."""
    rows, floors = [], []
    for result in measurement.results:
        quality, label = result.quality, measurement.labels[result.subject]
        ratio = 1.0 if result.is_reference and quality else result.perplexity_ratio
        perplexity = quality.perplexity if quality else None
        rows.append(_quality_row(label, perplexity, ratio, quality.divergence if quality else None))
        if quality and quality.noise_floor:
            floors.append(_quality_row(f"{label} against itself", None, None, quality.noise_floor))
    return Table.of(rows + floors)


def _quality_row(label: str, perplexity: float | None, ratio: float | None, divergence: Divergence | None) -> Row:
    return [
        (Column("Row"), label),
        (Column("Perplexity", "perplexity"), perplexity),
        (Column("to reference", "ratio"), ratio),
        *((column, getattr(divergence, field, None)) for column, field in DIVERGENCE_COLUMNS.items()),
    ]


def memory_table(measurement: Measurement, scenario: Scenario) -> Table:
    """What the bytes of one scenario's peak are for; the process's and the device's view where NVML told."""
    return Table.of(
        [
            (Column("Row"), measurement.labels[result.subject]),
            *((column, getattr(timing.memory, field)) for column, field in MEMORY_COLUMNS.items()),
        ]
        for result, timing in _timed(measurement, scenario)
        if timing.memory is not None
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
