"""Which tables a report has, and which columns each of them."""

from collections.abc import Sequence

from bench.records.record import Divergence, Phase, Subject
from bench.records.scenario import Scenario
from quantize.variant import REFERENCE
from reports.notes import paragraph, prompts_text, warnings
from reports.results import Measurement, Result, Timing
from reports.signals import Failure
from reports.table import Block, Bullets, Cell, Column, Heading, Page, Paragraph, Table

REFERENCE_METHOD = "FP16/BF16"


SPEED_PHASES: tuple[Phase, ...] = ("prefill", "decode")
"""The blocks of rows in the speed table."""


MEMORY_ROLES = {
    "Weights": "weights_bytes",
    "KV cache": "kv_cache_bytes",
    "Activations": "activations_bytes",
    "Rest": "rest_bytes",
    "Run peak": "run_peak_bytes",
    "Load peak": "load_peak_bytes",
    "Reserved": "reserved_peak_bytes",
    "Process (NVML)": "nvml_process_bytes",
    "Device (NVML)": "nvml_device_bytes",
}
"""The memory table's columns, and the fields of Memory behind them."""

CHECKPOINT_COLUMNS = (
    Column("Base Model"),
    Column("Method"),
    Column("q_group_size", "count", missing=""),
    Column("w_bit", "count", missing=""),
    Column("version", missing=""),
)
"""What the published table says of a checkpoint before its figures."""


def page(found: Sequence[Measurement]) -> Page:
    """The whole report; a heading for each measurement where there are several."""
    blocks: list[Block] = []
    for measurement in found:
        if len(found) > 1:
            dtypes = " and ".join(measurement.compute_dtypes)
            blocks.append(Heading(f"On {measurement.device}{f', computing in {dtypes}' if dtypes else ''}"))
        blocks += _blocks(measurement)
    return tuple(blocks)


def _blocks(measurement: Measurement) -> list[Block]:
    labels = row_labels(measurement)
    blocks: list[Block] = [published_table(measurement)]
    for scenario in measurement.scenarios:
        speed = speed_table(measurement, scenario, labels)
        if speed.rows:
            blocks += [Paragraph(f"Speed in the scenario `{scenario.name}` ({shape_text(scenario)}):"), speed]
        lengths = length_table(measurement, scenario, labels)
        if lengths.rows:
            blocks += [Paragraph(f"Prefill time in `{scenario.name}` by tokens of the prompt:"), lengths]
    for scenario in measurement.scenarios:
        memory = memory_table(measurement, scenario, labels)
        if memory.rows:
            blocks += [Paragraph(f"Memory in the scenario `{scenario.name}`, by what it is for:"), memory]
    if not all(result.subject.dummy for result in measurement.results):  # random weights have no quality
        blocks += [Paragraph("Quality:"), quality_table(measurement, labels)]
    tasks = task_table(measurement, labels)
    if tasks.rows:
        blocks += [Paragraph("Tasks (lm-eval):"), tasks]
    failures = failure_table(measurement, labels)
    if failures.rows:
        blocks += [Paragraph("Runs that did not end well:"), failures]
    warned = warnings(measurement, labels)
    if warned:
        blocks.append(Bullets(warned))
    blocks.append(Paragraph(paragraph(measurement)))
    return blocks


def published_table(measurement: Measurement) -> Table:
    """The columns of the published table, in its order."""
    memory = "RAM GB" if measurement.memory_is_ram else "VRAM GB"
    columns = (*CHECKPOINT_COLUMNS, Column(memory, "gigabytes"), Column("Time", "ratio"), Column("Download"))
    return Table(columns, tuple(_published_row(measurement, result) for result in measurement.results))


def _published_row(measurement: Measurement, result: Result) -> tuple[Cell, ...]:
    subject = result.subject
    return (
        subject.base_model,
        method_text(result),
        subject.q_group_size,
        subject.w_bit,
        subject.version,
        measurement.run_peak_bytes(result),
        measurement.time(result),
        subject.download or subject.name,
    )


def method_text(result: Result) -> str:
    """The column Method; the reference says when it did not compute in half precision."""
    if not result.is_reference:
        return result.subject.method
    if result.compute_dtype == "float32":
        return f"{REFERENCE_METHOD}, computed in float32"
    return REFERENCE_METHOD


def speed_table(measurement: Measurement, scenario: Scenario, labels: dict[Subject, str]) -> Table:
    """One row for each phase and checkpoint, a phase's rows together so that they compare at a glance.

    GB/s is of what a decode step reads, and has a column where a record tells it.
    """
    columns = (
        Column("Phase"),
        Column("Row"),
        Column("Time", "ratio"),
        Column("95% interval", "range", missing=""),
        Column("Spread", "range", missing=""),
        Column("Verdict", missing=""),
        Column("Tokens/s", "per_second"),
        Column("GB/s", "gigabytes", missing="", optional=True),
        Column("of copy", "share", missing="", optional=True),
        Column("Kernel"),
    )
    phases = [phase for phase in SPEED_PHASES if scenario.decode_steps or phase == "prefill"]
    rows = [
        _speed_row(phase, measurement, result, timing, labels[result.subject])
        for phase in phases
        for result in measurement.results
        if (timing := result.timing(scenario)) is not None
    ]
    return Table(columns, tuple(rows)).without_empty()


def _speed_row(phase: Phase, measurement: Measurement, result: Result, timing: Timing, label: str) -> tuple[Cell, ...]:
    ratio = timing.ratio(phase)
    interval: Cell = None
    if ratio is not None:
        interval = ratio.interval or f"{len(ratio.rounds)} round{'s' if len(ratio.rounds) > 1 else ''}"
    prefill = phase == "prefill"
    return (
        phase,
        label,
        result.ratio_in(timing, phase),
        interval,
        ratio.spread if ratio else None,
        ratio.verdict if ratio else None,
        timing.prefill_tokens_per_s if prefill else timing.decode_tokens_per_s,
        None if prefill else timing.decode_bytes_per_s,
        None if prefill else measurement.copy_share(timing),
        _kernel_text(phase, timing),
    )


def _kernel_text(phase: Phase, timing: Timing) -> str | None:
    """What ran; of decode steps in mode "graph" also how they ran."""
    if phase == "prefill":
        return " / ".join(timing.prefill_kernels) or None
    modes = timing.decode_modes if timing.scenario.mode == "graph" else ()
    return ", ".join(filter(None, (" / ".join(timing.decode_kernels), " / ".join(modes)))) or None


def length_table(measurement: Measurement, scenario: Scenario, labels: dict[Subject, str]) -> Table:
    """Prefill at each prompt length of a scenario that has several, relative to the reference at that length."""
    seconds = {
        result.subject: timing.prefill_by_length_s
        for result in measurement.results
        if (timing := result.timing(scenario)) is not None and timing.prefill_by_length_s
    }
    references = {
        result.subject.baseline: seconds[result.subject]
        for result in measurement.results
        if result.is_reference and result.subject in seconds
    }
    rows: list[tuple[Cell, ...]] = [
        (labels[subject], *(ours / theirs for ours, theirs in zip(own, references[subject.baseline], strict=True)))
        for subject, own in seconds.items()
        if subject.baseline in references
    ]
    return Table((Column("Row"), *(Column(f"{length:,}", "ratio") for length in scenario.lengths)), tuple(rows))


def quality_table(measurement: Measurement, labels: dict[Subject, str]) -> Table:
    """Perplexity, and how far the next-token distributions are from the reference's."""
    columns = (
        Column("Row"),
        Column("Perplexity", "perplexity"),
        Column("to reference", "ratio"),
        Column("KLD mean", "nats", missing="", optional=True),
        Column("median", "nats", missing="", optional=True),
        Column("99%", "nats", missing="", optional=True),
        Column("Flips", "share", missing="", optional=True),
    )
    rows = [
        (
            labels[result.subject],
            result.quality.perplexity if result.quality else None,
            1.0 if result.is_reference and result.quality else result.perplexity_ratio,
            *_divergence_cells(result.quality.divergence if result.quality else None),
        )
        for result in measurement.results
    ]
    floors = [
        (f"{labels[result.subject]} against itself", None, None, *_divergence_cells(result.quality.noise_floor))
        for result in measurement.results
        if result.quality and result.quality.noise_floor
    ]
    return Table(columns, (*rows, *floors)).without_empty()


def _divergence_cells(divergence: Divergence | None) -> tuple[Cell, ...]:
    if divergence is None:
        return (None, None, None, None)
    return (divergence.mean, divergence.median, divergence.p99, divergence.flips)


def memory_table(measurement: Measurement, scenario: Scenario, labels: dict[Subject, str]) -> Table:
    """What the bytes of one scenario's peak are for; the process's and the device's view where NVML told."""
    memories = {
        result.subject: timing.memory
        for result in measurement.results
        if (timing := result.timing(scenario)) is not None and timing.memory is not None
    }
    rows = [
        (labels[subject], *(getattr(memory, field) for field in MEMORY_ROLES.values()))
        for subject, memory in memories.items()
    ]
    columns = (Column(f"{title} GB", "gigabytes", optional=True) for title in MEMORY_ROLES)
    return Table((Column("Row"), *columns), tuple(rows)).without_empty()


def task_table(measurement: Measurement, labels: dict[Subject, str]) -> Table:
    """One row a checkpoint, one column a task of lm-eval."""
    names = list(dict.fromkeys(score.name for result in measurement.results for score in result.tasks))
    rows = []
    for result in measurement.results:
        scores = {score.name: score for score in result.tasks}
        if scores:
            rows.append((labels[result.subject], *(scores[n].value if n in scores else None for n in names)))
    return Table((Column("Row"), *(Column(name, "share") for name in names)), tuple(rows))


def failure_table(measurement: Measurement, labels: dict[Subject, str]) -> Table:
    """Every run that did not end well, with its reason."""
    columns = (Column("Row"), Column("Run"), Column("Rounds", missing=""), Column("Status"), Column("Reason"))
    rows = [
        (labels[result.subject], failure.work, _rounds_text(failure), failure.status, failure.reason)
        for result in measurement.results
        for failure in result.failures
    ]
    return Table(columns, tuple(rows))


def _rounds_text(failure: Failure) -> str | None:
    """Rounds are counted from 1 for the reader."""
    return ", ".join(str(number + 1) for number in sorted(failure.rounds)) or None


def row_labels(measurement: Measurement) -> dict[Subject, str]:
    """A short name for each row: "AWQ GEMM, group 64"; where that is ambiguous, the checkpoint's name."""
    many = len(measurement.base_models) > 1
    labels = {result.subject: _label(result, with_model=many) for result in measurement.results}
    taken = list(labels.values())
    return {subject: subject.name if taken.count(label) > 1 else label for subject, label in labels.items()}


def _label(result: Result, *, with_model: bool) -> str:
    subject = result.subject
    if subject.variant == REFERENCE.name and not result.is_reference:
        return subject.name
    method = REFERENCE_METHOD if result.is_reference else subject.method
    words = [subject.base_model] if with_model else []
    words += [method] if subject.version is None else [method, subject.version]
    group = "" if subject.q_group_size is None else f", group {subject.q_group_size}"
    kernel = "" if subject.kernel is None else f", {subject.kernel} kernel"
    return " ".join(words) + group + kernel


def shape_text(scenario: Scenario) -> str:
    """1024 prompt tokens, 1 new, batch 1; or 12 prompts of 183 to 1,402 tokens, 1 new, batch 1."""
    mode = "" if scenario.mode == "eager" else f", {scenario.mode} decode"
    return f"{prompts_text(scenario)}, {scenario.new_tokens} new, batch {scenario.batch}{mode}"
