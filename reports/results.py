"""Everything known of each checkpoint, from the records: one Measurement a machine, one Result a row."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Literal

from bench.records.broken import broken_subjects, latest_quality, references_of
from bench.records.comparison import Comparison, compare, grouped, unique
from bench.records.environment import Environment
from bench.records.ratio import Ratio
from bench.records.record import PHASES, Memory, Phase, Quality, Record, Status, Subject, TaskScore, latency_records
from bench.records.scenario import Scenario
from quantize.errors import UserError
from quantize.process_memory import collector_paused
from quantize.variant import REFERENCE, known_variants
from reports.compatibility import HEADLINE, check_alike, check_compute_dtypes, check_subjects

REFERENCE_METHOD = "FP16/BF16"
PARTS: tuple[Phase, ...] = ("prefill", "decode")
OUTLIER_MADS = 5.0  # (scaled) median absolute deviations from a run's median, beyond which a sample is an outlier


@dataclass(frozen=True)
class Failure:
    """Runs of a scenario, or another kind of work, that did not end well for one reason; rounds: none for quality."""

    work: str
    status: Status
    reason: str
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """One checkpoint in one scenario.

    rounds:          how many ended well; seconds: median over rounds of each phase.
    comparison:      with the reference; None for the reference itself and where there is nothing to compare with.
    kernels:         what ran the linear layers in each of PARTS; empty where nothing told.
    decode_mode:     how the decode steps ran: eager, CUDA graph, static cache (the same without a graph), or compiled.
    compile_s:       median over rounds of the seconds that compiling a step took, in no other figure.
    memory:          of the run with the highest peak; unsteady_rounds: rounds whose warm-up never became steady.
    outliers:        samples far from the median of their run, of so many samples.
    samples:         how many were timed; energy_j: median over rounds, None where nothing told.
    throttled:       what held the GPU's clocks down; other_processes: other programs on the GPU, at most.
    prefill_by_length_s: median over all passes of all rounds, for each of the scenario's prompt lengths."""

    scenario: Scenario
    rounds: int
    seconds: dict[Phase, float]
    comparison: Comparison | None = None
    kernels: dict[Phase, str] = field(default_factory=dict)
    decode_mode: str | None = None
    compile_s: float | None = None
    memory: Memory | None = None
    unsteady_rounds: int = 0
    outliers: int = 0
    samples: int = 0
    energy_j: float | None = None
    throttled: tuple[str, ...] = ()
    other_processes: int = 0
    prefill_by_length_s: tuple[float, ...] = ()

    @property
    def run_peak_bytes(self) -> int | None:
        """The highest over the rounds."""
        return self.memory.run_peak_bytes if self.memory else None

    def tokens_per_s(self, phase: Phase) -> float | None:
        """Prompt tokens a second, over all prompt lengths, or new ones while decoding; over the whole batch."""
        seconds, decode = self.seconds.get(phase), phase == "decode"
        return (self.scenario.batch if decode else self.scenario.pass_prompt_tokens) / seconds if seconds else None

    @property
    def decode_bytes_per_s(self) -> float | None:
        """Weights read a second while decoding: what a step must read at least (Memory) over its time."""
        seconds, read = self.seconds.get("decode"), self.memory.decode_bytes if self.memory else None
        return read / seconds if seconds and read else None

    def ratio(self, phase: Phase) -> Ratio | None:
        return self.comparison.ratios.get(phase) if self.comparison else None


@dataclass(frozen=True)
class Result:
    """One row: a checkpoint on one device. Unknown is None.

    is_reference:     whether its baseline is compared with it.
    weights_bytes:    of the loaded model; load_peak_bytes: highest over all loads.
    quality, tasks:   the latest figures.
    perplexity_ratio: over the reference's perplexity on the same text, None where the reference is of another base
                      model: it would say nothing of the quantization.
    placements:       how a model too big for one GPU was spread, each way once; empty for one on one device.
    quantized_share:  of the decoder's matrices.
    broken:           why no sound checkpoint has its figures, None where they may be one's."""

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
    quantized_share: float | None = None
    broken: str | None = None

    @property
    def share_below_all(self) -> float | None:
        """The share that is quantized, where it is known and not all."""
        share = self.quantized_share
        return share if share is not None and share < 0.9995 else None

    @property
    def mean_divergence(self) -> float | None:
        """KL(reference || this) in nats a token."""
        return self.quality.divergence.mean if self.quality and self.quality.divergence else None

    @property
    def loss(self) -> float | None:
        """How much more perplexity than the reference, as a share; 0 for a reference that was judged."""
        ratio = self.perplexity_ratio or (1.0 if self.is_reference and self.quality else None)
        return None if ratio is None else ratio - 1

    def timing(self, scenario: Scenario | None) -> Timing | None:
        return self.timings.get(scenario) if scenario else None

    def status_in(self, scenario: Scenario | None) -> Status | None:
        """How the last of its runs in this scenario failed, None where none did."""
        failed = [one.status for one in self.failures if scenario and one.work == scenario.name]
        return failed[-1] if failed else None

    def ratio_in(self, timing: Timing, phase: Phase) -> float | None:
        """The ratio to the reference; 1 for the reference itself."""
        if self.is_reference:
            return 1.0 if phase in timing.seconds else None
        ratio = timing.ratio(phase)
        return ratio.value if ratio else None


@dataclass(frozen=True)
class Measurement:
    """All that was measured on one device, each base model in one compute dtype.

    environment: the fingerprint, the same for every record in what matters; empty when every run failed.
    memory:      what the peaks mean, "RSS" or "CUDA allocator", None when unknown.
    scenarios:   in the order in which they were first run; first_start, last_start: of the runs that ended well."""

    device: str
    environment: Environment
    memory: str | None
    scenarios: tuple[Scenario, ...]
    results: tuple[Result, ...]
    first_start: datetime | None = None
    last_start: datetime | None = None

    @property
    def headline(self) -> Scenario | None:
        """The scenario `published`, None when it was not run."""
        return next((scenario for scenario in self.scenarios if scenario.name == HEADLINE), None)

    @property
    def peak_scenario(self) -> Scenario | None:
        """The scenario that peaks are shown of: `published`, or when that was not run, the one with the most tokens."""
        return self.headline or max(self.scenarios, key=lambda one: one.positions * one.batch, default=None)

    def scenario_of(self, phase: Phase) -> Scenario | None:
        """Which scenario a phase's speed is of: `published`, else the first; for decoding the first that decodes."""
        found = [self.headline, *self.scenarios]
        return next((one for one in found if one and (phase != "decode" or one.decode_steps)), None)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def memory_name(self) -> Literal["RAM", "VRAM"]:
        """Whose peaks they are: the machine's, or the GPU's."""
        return "RAM" if self.memory == "RSS" or (self.memory is None and not self.on_gpu) else "VRAM"

    @property
    def compute_dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(result.compute_dtype for result in self.results if result.compute_dtype))

    @cached_property
    def labels(self) -> dict[Subject, str]:
        """A short name for each row: "AWQ GEMM, group 64"; where that is ambiguous, the checkpoint's name."""
        many = len({result.subject.base_model for result in self.results}) > 1
        labels = [_label(result, with_model=many) for result in self.results]
        return {
            row.subject: (row.subject.name if labels.count(label) > 1 else label) + (", broken" if row.broken else "")
            for row, label in zip(self.results, labels, strict=True)
        }

    def timed(self, scenario: Scenario | None) -> list[tuple[Result, Timing]]:
        """The rows that ran in this scenario."""
        return [(result, timing) for result in self.results if (timing := result.timing(scenario))]

    def run_peak_bytes(self, result: Result) -> int | None:
        """The peak while running `peak_scenario`."""
        timing = result.timing(self.peak_scenario)
        return timing.run_peak_bytes if timing else None

    def time(self, result: Result) -> float | str | None:
        """The ratio of total latency in `published`; the status where that failed."""
        timing = result.timing(self.headline)
        return result.ratio_in(timing, "total") if timing else result.status_in(self.headline)

    def copy_share(self, timing: Timing) -> float | None:
        """The bytes a second that decoding reads, as a share of what a plain copy on the device moves."""
        copied, read = self.environment.copy_bytes_per_s, timing.decode_bytes_per_s
        return read / copied if copied and read else None


def _label(result: Result, *, with_model: bool) -> str:
    subject = result.subject
    if subject.variant == REFERENCE.name and not result.is_reference:
        return subject.name
    method = REFERENCE_METHOD if result.is_reference else subject.method
    words = [subject.base_model if with_model else None, method, subject.version]
    group = "" if subject.q_group_size is None else f", group {subject.q_group_size}"
    kernel = "" if subject.kernel is None else f", {subject.kernel} kernel"
    kernel += "" if subject.engine is None else f", {subject.engine}"
    return " ".join(word for word in words if word is not None) + group + kernel


@collector_paused()
def measurements(records: Sequence[Record]) -> list[Measurement]:
    """What these records hold: one Measurement a device, in the order first measured.

    A device on which some base model ran in two compute dtypes has one Measurement for each of them. Raises UserError
    for records that may not stand in one table (reports.compatibility), and for none of a reference."""
    records = unique(records)
    check_subjects(records)
    may_be = [record for record in records if record.subject.may_be_reference]
    timed = any(record.kind == "latency" for record in records)
    if not (latency_records(may_be) if timed else [one for one in may_be if one.status == "ok"]):
        what = f"quantize --variant {REFERENCE.name} into the same folder and run `bench` again"
        if failed := [one for one in may_be if one.status != "ok"]:
            what = f"the reference did not run ({failed[-1].status}: {failed[-1].reason}); fix that and `bench` again"
        raise UserError(f"no {'latency ' if timed else ''}record of the reference: {what}")
    check_compute_dtypes(latency_records(records))
    return [_measurement(device, group) for (device, _), group in _groups(records).items()]


def _groups(records: Sequence[Record]) -> dict[tuple[str, str | None], list[Record]]:
    """The records of each device, by dtype too where a baseline ran in several; a failed run without joins them all."""
    known = grouped((one for one in records if one.compute_dtype), lambda one: (one.device, one.subject.baseline))
    split = {device for (device, _), found in known.items() if len({one.compute_dtype for one in found}) > 1}
    groups: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        own: Iterable[str | None] = [None]
        if record.device in split:
            all_of_device = (one.compute_dtype for one in records if one.device == record.device)
            own = [record.compute_dtype] if record.compute_dtype else dict.fromkeys(filter(None, all_of_device))
        for dtype in own:
            groups.setdefault((record.device, dtype), []).append(record)
    return groups


def _measurement(device: str, records: Sequence[Record]) -> Measurement:
    check_alike(records)
    scenarios = tuple(dict.fromkeys(record.scenario for record in records if record.scenario))
    good = [record for record in records if record.status == "ok"]
    starts = [moment for record in good if (moment := record.started)]
    of_subject = grouped(records, lambda record: record.subject)
    references = references_of(records)
    baselines = {name: n for n, name in enumerate(dict.fromkeys(one.baseline for one in of_subject))}
    reasons, order = broken_subjects(records), list(known_variants())

    def place(one: Subject) -> tuple[int, bool, float, str]:
        """By baseline, the reference first, then as the variants are listed; a suite's as its first round ran them."""
        if one.family is None:
            row: float = order.index(one.variant) if one.variant in order else len(order)
        else:
            first_round = [run.position for run in of_subject[one] if run.round == 0 and run.position is not None]
            row = min(first_round, default=float("inf"))
        return baselines[one.baseline], references.get(one.baseline) != one, row, one.name

    return Measurement(
        device=device,
        environment=good[0].environment if good else Environment(),
        memory=next((record.memory.source for record in good if record.memory), None),
        scenarios=scenarios,
        results=tuple(
            replace(_result(one, references.get(one.baseline), of_subject), broken=reasons.get(one))
            for one in sorted(of_subject, key=place)
        ),
        first_start=min(starts, default=None),
        last_start=max(starts, default=None),
    )


def _result(subject: Subject, reference: Subject | None, of_subject: dict[Subject, list[Record]]) -> Result:
    own, others = of_subject[subject], of_subject[reference] if reference and reference != subject else []
    good, reference_good = (grouped(latency_records(some), lambda one: one.scenario) for some in (own, others))
    quality = latest_quality(own)
    reference_quality = latest_quality(record for record in others if record.subject.base_model == subject.base_model)
    memory = [record.memory for record in own if record.status == "ok" and record.memory]
    return Result(
        subject=subject,
        is_reference=reference == subject,
        compute_dtype=next((record.compute_dtype for record in own if record.compute_dtype), None),
        weights_bytes=memory[-1].weights_bytes if memory else None,
        load_peak_bytes=max((peak for one in memory if (peak := one.load_peak_bytes) is not None), default=None),
        quality=quality,
        perplexity_ratio=quality.perplexity / reference_quality.perplexity if quality and reference_quality else None,
        timings={one: _timing(one, runs, reference_good.get(one, [])) for one, runs in good.items() if one},
        tasks=next((record.tasks for record in reversed(own) if record.status == "ok" and record.tasks), ()),
        failures=_failures(own),
        placements=tuple(dict.fromkeys(record.placement for record in own if record.placement)),
        quantized_share=next((one.quantized_share for one in reversed(own) if one.quantized_share is not None), None),
    )


def _timing(scenario: Scenario, runs: Sequence[Record], reference: Sequence[Record]) -> Timing:
    """From ok latency records of this scenario."""
    seconds = {phase: median_of(run.times[phase] for run in runs) for phase in PHASES}
    latencies = [run.latency for run in runs if run.latency]
    kernels = [run.kernels for run in runs if run.kernels]
    states = [run.device_state for run in runs if run.device_state]
    chain = itertools.chain.from_iterable
    samples = [one for latency in latencies for one in (latency.prefill_s, tuple(chain(latency.decode_s)))]
    passes = chain(latency.prefill_by_length_s for latency in latencies)
    return Timing(
        scenario=scenario,
        rounds=len(runs),
        seconds={phase: median for phase, median in seconds.items() if median is not None},
        comparison=compare(runs, reference),
        kernels={part: " / ".join(dict.fromkeys(getattr(one, part) for one in kernels)) for part in PARTS if kernels},
        decode_mode=" / ".join(dict.fromkeys(one.decode_mode for one in latencies if one.decode_mode)) or None,
        compile_s=median_of(one.compile_s for one in latencies),
        memory=max((run.memory for run in runs if run.memory), key=lambda one: one.run_peak_bytes or 0, default=None),
        unsteady_rounds=sum(one.steady is False for one in latencies),
        outliers=sum(map(outliers, samples)),
        samples=sum(map(len, samples)),
        energy_j=median_of(state.energy_j for state in states),
        throttled=tuple(dict.fromkeys(chain(state.throttle_reasons for state in states))),
        other_processes=max((state.other_processes for state in states), default=0),
        prefill_by_length_s=tuple(statistics.median(seconds) for seconds in zip(*passes, strict=True)),
    )


def median_of(values: Iterable[float | None]) -> float | None:
    """Of those that are known, None where none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def outliers(samples: Sequence[float]) -> int:
    """How many lie further from the median than OUTLIER_MADS median absolute deviations and a tenth of the median."""
    if len(samples) < 3:
        return 0
    middle = statistics.median(samples)
    deviation = statistics.median(abs(sample - middle) for sample in samples)
    bound = max(OUTLIER_MADS * 1.4826 * deviation, 0.1 * middle)
    return sum(abs(sample - middle) > bound for sample in samples)


def _failures(records: Sequence[Record]) -> tuple[Failure, ...]:
    """Failed runs that no later run of the same work made good, those of one work and reason together."""
    rounds: dict[tuple[str, Status, str], dict[int, None]] = {}
    for same in grouped(records, lambda one: (one.kind, one.scenario, one.round)).values():
        last_good = max((n for n, one in enumerate(same) if one.status == "ok"), default=-1)
        for one in same[last_good + 1 :]:
            key = one.scenario.name if one.scenario else one.kind, one.status, one.reason or ""
            rounds.setdefault(key, {}).update({one.round: None} if one.round is not None else {})
    return tuple(Failure(*key, tuple(own)) for key, own in rounds.items())
