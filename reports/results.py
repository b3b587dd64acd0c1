"""Everything known of each checkpoint, from the records: one Measurement a machine, one Result a row."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bench.records.comparison import Comparison, compare, started
from bench.records.phase import PHASES, Phase, phase_s
from bench.records.record import (
    Kernels,
    Latency,
    Memory,
    Quality,
    Record,
    Status,
    Subject,
    TaskScore,
    family_of,
    latency_records,
    may_be_reference,
)
from bench.records.scenario import SCENARIOS, Scenario
from quantize.errors import UserError
from quantize.variant import REFERENCE, VARIANTS
from reports.compatibility import check_alike, check_subjects, refuse_compute_dtype, refuse_scenarios

OUTLIER_MADS = 5.0
"""A sample this many (scaled) median absolute deviations from its run's median is called an outlier, never dropped."""

HEADLINE = SCENARIOS["published"].name
"""The scenario behind the column Time."""


@dataclass(frozen=True)
class Failure:
    """Runs of one checkpoint that did not end well, for one reason. `rounds` is empty for a quality run."""

    work: str
    status: Status
    reason: str
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """One checkpoint in one scenario.

    rounds:         how many ended well.
    seconds:        median over rounds of each phase; "decode" is seconds a step.
    kernels:        what ran the linear layers, None where no run told.
    run_peak_bytes: highest over the rounds. memory: of the run with that peak.
    unsteady:       in how many rounds the warm-up never became steady. outliers: how many samples lie far from the
    median of their run, of how many (`outliers_of`).
    decode_mode:    how the decode steps ran (bench.records.record.Latency), None where no record tells.
    prefill_by_length_s: median over all passes of all rounds, for each of the scenario's prompt lengths.
    comparison:     against the reference; None for the reference itself and where there is nothing to
    compare with.
    """

    scenario: Scenario
    rounds: int
    seconds: dict[Phase, float]
    kernels: Kernels | None
    run_peak_bytes: int | None
    comparison: Comparison | None
    memory: Memory | None = None
    unsteady: int = 0
    outliers: tuple[int, int] = (0, 0)
    energy_j: float | None = None
    throttled: tuple[str, ...] = ()
    neighbours: int = 0
    decode_mode: str | None = None
    prefill_by_length_s: tuple[float, ...] = ()

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens a second, over the whole batch and all prompt lengths."""
        seconds = self.seconds.get("prefill")
        return self.scenario.pass_prompt_tokens / seconds if seconds else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens a second while decoding, over the whole batch."""
        seconds = self.seconds.get("decode")
        return self.scenario.batch / seconds if seconds else None

    @property
    def decode_bytes_per_s(self) -> float | None:
        """Weights read a second while decoding: what a step must read at least (Memory) over its time."""
        seconds, read = self.seconds.get("decode"), self.memory.decode_bytes if self.memory else None
        return read / seconds if seconds and read else None


@dataclass(frozen=True)
class Result:
    """One row: a checkpoint on one device. Unknown is None.

    load_peak_bytes: highest over all loads. perplexity_ratio: over the reference's perplexity on the same
    text, None where the reference is of another base model: it would say nothing of the quantization. placements: how
    a model too big for one GPU was spread, each way once; empty for one on one device.
    """

    subject: Subject
    is_reference: bool
    compute_dtype: str | None
    weights_bytes: int | None
    load_peak_bytes: int | None
    quality: Quality | None
    perplexity_ratio: float | None
    timings: dict[Scenario, Timing]
    tasks: tuple[TaskScore, ...]
    failures: tuple[Failure, ...]
    placements: tuple[str, ...] = ()

    def timing(self, scenario: Scenario | None) -> Timing | None:
        return self.timings.get(scenario) if scenario else None


@dataclass(frozen=True)
class Measurement:
    """All that was measured on one device, each base model in one compute dtype.

    environment: the fingerprint, the same for every record in what matters; empty when every run failed.
    scenarios:   in the order in which they were first run.
    memory:      what the peaks mean, "RSS" or "CUDA allocator", None when unknown.
    """

    device: str
    environment: dict[str, Any]
    memory: str | None
    scenarios: tuple[Scenario, ...]
    results: tuple[Result, ...]
    first_start: datetime | None
    last_start: datetime | None

    @property
    def headline(self) -> Scenario | None:
        """The scenario `published`, None when it was not run."""
        return next((scenario for scenario in self.scenarios if scenario.name == HEADLINE), None)

    def copy_share(self, timing: Timing) -> float | None:
        """The bytes a second that decoding reads, as a share of what a plain copy on the device moves."""
        copied, read = self.environment.get("copy_bytes_per_s"), timing.decode_bytes_per_s
        return read / copied if copied and read else None

    @property
    def compute_dtypes(self) -> tuple[str, ...]:
        """Every compute dtype known, mostly one."""
        return tuple(dict.fromkeys(result.compute_dtype for result in self.results if result.compute_dtype))

    @property
    def base_models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(result.subject.base_model for result in self.results))


def measurements(records: Sequence[Record]) -> list[Measurement]:
    """What these records hold: one Measurement a device, in the order first measured.

    A device on which some base model ran in two compute dtypes has one Measurement for each of them.

    Raises UserError for records that may not stand in one table (see reports.compatibility), and when there is no
    latency record of any reference, since every ratio is to it.
    """
    check_subjects(records)
    if not any(may_be_reference(record.subject) for record in latency_records(records)):
        raise _no_reference(records)
    _check_compute_dtypes(records)
    return [_measurement(device, group) for (device, _), group in _groups(records).items()]


def _groups(records: Sequence[Record]) -> dict[tuple[str, str | None], list[Record]]:
    """The records of each device; by compute dtype too where a family ran in several on that device.

    A run that failed before its compute dtype was known joins every group of its device.
    """
    dtypes: dict[str, dict[str, list[str]]] = {}
    for record in records:
        known = dtypes.setdefault(record.device, {}).setdefault(family_of(record.subject), [])
        if record.compute_dtype and record.compute_dtype not in known:
            known.append(record.compute_dtype)
    groups: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        models = dtypes[record.device].values()
        split = dict.fromkeys(dtype for known in models for dtype in known)
        several = any(len(known) > 1 for known in models)
        own = [record.compute_dtype] if record.compute_dtype else list(split)
        for dtype in own if several else [None]:
            groups.setdefault((record.device, dtype), []).append(record)
    return groups


def _measurement(device: str, records: Sequence[Record]) -> Measurement:
    check_alike(records)
    scenarios = tuple(dict.fromkeys(record.scenario for record in records if record.scenario))
    headlines = [scenario for scenario in scenarios if scenario.name == HEADLINE]
    if len(headlines) > 1:
        refuse_scenarios(headlines[0], headlines[1])
    good = [record for record in records if record.status == "ok"]
    starts = sorted(moment for record in good if (moment := started(record)))
    references = _references(records)
    subjects = sorted(
        dict.fromkeys(record.subject for record in records),
        key=lambda subject: _row_order(subject, references, records),
    )
    return Measurement(
        device=device,
        environment=good[0].environment if good else {},
        memory=next((record.memory.source for record in good if record.memory), None),
        scenarios=scenarios,
        results=tuple(_result(subject, references, records) for subject in subjects),
        first_start=starts[0] if starts else None,
        last_start=starts[-1] if starts else None,
    )


def _references(records: Iterable[Record]) -> dict[str, Subject]:
    """The reference of each family: its base model in half precision, of several the first."""
    references: dict[str, Subject] = {}
    for record in records:
        if may_be_reference(record.subject):
            references.setdefault(family_of(record.subject), record.subject)
    return references


def _row_order(
    subject: Subject, references: dict[str, Subject], records: Sequence[Record]
) -> tuple[int, bool, int, str]:
    """Families as first measured; in each the reference, then a suite's own order, else the order of VARIANTS."""
    family = family_of(subject)
    families = list(dict.fromkeys(family_of(record.subject) for record in records))
    variants = list(VARIANTS)
    place = variants.index(subject.variant) if subject.variant in variants else len(variants)
    if subject.family is not None:
        place = _place_in_suite(subject, records)
    return families.index(family), references.get(family) != subject, place, subject.name


def _place_in_suite(subject: Subject, records: Sequence[Record]) -> int:
    """The position in the first round, which runs a suite's rows in its order; after all others where it has none."""
    places = [
        record.position
        for record in records
        if record.subject == subject and record.round == 0 and record.position is not None
    ]
    return min(places, default=len(records))


def _result(subject: Subject, references: dict[str, Subject], records: Sequence[Record]) -> Result:
    own = [record for record in records if record.subject == subject]
    reference = references.get(family_of(subject))
    others = [record for record in records if record.subject == reference and reference != subject]
    good = latency_records(own)
    quality = _quality(own)
    reference_quality = _quality(record for record in others if record.subject.base_model == subject.base_model)
    memory = [record.memory for record in own if record.status == "ok" and record.memory]
    load_peaks = [figures.load_peak_bytes for figures in memory if figures.load_peak_bytes is not None]
    scenarios = dict.fromkeys(record.scenario for record in good if record.scenario)
    return Result(
        subject=subject,
        is_reference=reference == subject,
        compute_dtype=next((record.compute_dtype for record in own if record.compute_dtype), None),
        weights_bytes=memory[-1].weights_bytes if memory else None,
        load_peak_bytes=max(load_peaks, default=None),
        quality=quality,
        perplexity_ratio=quality.perplexity / reference_quality.perplexity if quality and reference_quality else None,
        timings={scenario: _timing(scenario, good, latency_records(others)) for scenario in scenarios},
        tasks=next((record.tasks for record in reversed(own) if record.status == "ok" and record.tasks), ()),
        failures=_failures(own),
        placements=tuple(dict.fromkeys(record.placement for record in own if record.placement)),
    )


def _timing(scenario: Scenario, own: Sequence[Record], reference: Sequence[Record]) -> Timing:
    """From ok latency records; those of other scenarios are passed over."""
    runs = [record for record in own if record.scenario == scenario]
    seconds: dict[Phase, float] = {}
    for phase in PHASES:
        rounds = [value for run in runs if (value := phase_s(run, phase)) is not None]
        if rounds:
            seconds[phase] = statistics.median(rounds)
    latencies = [run.latency for run in runs if run.latency]
    memories = [run.memory for run in runs if run.memory]
    peaks = [memory.run_peak_bytes for memory in memories if memory.run_peak_bytes is not None]
    return Timing(
        scenario=scenario,
        rounds=len(runs),
        seconds=seconds,
        kernels=_kernels(runs),
        run_peak_bytes=max(peaks, default=None),
        comparison=compare(scenario, runs, [record for record in reference if record.scenario == scenario]),
        memory=max(memories, key=lambda memory: memory.run_peak_bytes or 0, default=None),
        unsteady=sum(run.latency is not None and run.latency.steady is False for run in runs),
        outliers=_outliers(runs),
        energy_j=_median([spent for run in runs if (spent := energy_of(run)) is not None]),
        throttled=tuple(dict.fromkeys(reason for run in runs for reason in _throttled(run))),
        neighbours=max((_neighbours(run) for run in runs), default=0),
        decode_mode=" / ".join(dict.fromkeys(one.decode_mode for one in latencies if one.decode_mode)) or None,
        prefill_by_length_s=_by_length(latencies),
    )


def _by_length(latencies: Iterable[Latency]) -> tuple[float, ...]:
    passes = [one for latency in latencies for one in latency.prefill_by_length_s]
    return tuple(statistics.median(seconds) for seconds in zip(*passes, strict=True))


def outliers_of(samples: Sequence[float]) -> int:
    """How many lie further from the median than OUTLIER_MADS median absolute deviations and a tenth of the median."""
    if len(samples) < 3:
        return 0
    middle = statistics.median(samples)
    deviation = statistics.median(abs(sample - middle) for sample in samples)
    bound = max(OUTLIER_MADS * 1.4826 * deviation, 0.1 * middle)
    return sum(abs(sample - middle) > bound for sample in samples)


def _outliers(runs: Iterable[Record]) -> tuple[int, int]:
    series = [
        samples
        for run in runs
        if run.latency
        for samples in (run.latency.prefill_s, tuple(step for steps in run.latency.decode_s for step in steps))
    ]
    return sum(map(outliers_of, series)), sum(map(len, series))


def energy_of(run: Record) -> float | None:
    """Joules that the GPU took while the run's passes ran, its warm-up included; None where nothing told."""
    state = run.device_state or {}
    before, after = ((state.get(when) or {}).get("energy_j") for when in ("before", "after"))
    return None if before is None or after is None else float(after - before)


def _throttled(run: Record) -> tuple[str, ...]:
    looks = [(run.device_state or {}).get(when) or {} for when in ("before", "between", "after")]
    return tuple(reason for look in looks for reason in look.get("throttle_reasons") or ())


def _neighbours(run: Record) -> int:
    looks = [(run.device_state or {}).get(when) or {} for when in ("before", "between", "after")]
    return max((look.get("other_processes") or 0 for look in looks), default=0)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _kernels(runs: Sequence[Record]) -> Kernels | None:
    """What ran; where it changed from round to round, every name."""
    found = [run.kernels for run in runs if run.kernels]
    if not found:
        return None
    prefill = dict.fromkeys(kernels.prefill for kernels in found)
    decode = dict.fromkeys(kernels.decode for kernels in found)
    return Kernels(" / ".join(prefill), " / ".join(decode))


def _quality(records: Iterable[Record]) -> Quality | None:
    """The latest figures."""
    found = [record.quality for record in records if record.status == "ok" and record.quality]
    return found[-1] if found else None


def _failures(records: Sequence[Record]) -> tuple[Failure, ...]:
    """Failed runs that no later run of the same work made good, those of one work and reason together."""
    found: dict[tuple[str, Status, str], list[int]] = {}
    for place, record in enumerate(records):
        work = (record.kind, record.scenario, record.round)
        made_good = any(
            later.status == "ok" and (later.kind, later.scenario, later.round) == work for later in records[place + 1 :]
        )
        if record.status != "ok" and not made_good:
            key = (_work(record), record.status, record.reason or "")
            found.setdefault(key, []).extend([] if record.round is None else [record.round])
    return tuple(
        Failure(work, status, reason, tuple(dict.fromkeys(rounds))) for (work, status, reason), rounds in found.items()
    )


def _work(record: Record) -> str:
    return record.scenario.name if record.scenario else record.kind


def _no_reference(records: Iterable[Record]) -> UserError:
    failed = [record for record in records if may_be_reference(record.subject) and record.status != "ok"]
    if failed:
        why = f"the reference did not run ({failed[-1].status}: {failed[-1].reason})"
        return UserError(f"no latency record of the reference: {why}; mend that and run `bench` again")
    return UserError(
        f"no latency record of the reference: quantize --variant {REFERENCE.name} into the same folder "
        "and run `bench` again"
    )


def _check_compute_dtypes(records: Sequence[Record]) -> None:
    """Refuse a checkpoint whose reference ran on the same device, but only in another compute dtype."""
    good = latency_records(records)
    references: dict[tuple[str, str], list[Record]] = {}
    for record in good:
        if may_be_reference(record.subject):
            references.setdefault((record.device, family_of(record.subject)), []).append(record)
    for record in good:
        own = references.get((record.device, family_of(record.subject)), [])
        if own and record.compute_dtype not in [reference.compute_dtype for reference in own]:
            refuse_compute_dtype(record, own)
