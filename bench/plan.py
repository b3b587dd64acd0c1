"""What to run, in which order, and what of it is still missing. Pure functions; imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.record import Kind, Record, Subject
from bench.scenario import Scenario
from quantize.checkpoint import Checkpoint


@dataclass(frozen=True)
class PlannedRun:
    """One process: a checkpoint with all scenarios of one round, or its quality (no scenarios, no round).

    position counts the runs of the whole plan from 0, so that a figure can be held against the time it was
    taken.
    """

    kind: Kind
    checkpoint: Checkpoint
    position: int
    scenarios: tuple[Scenario, ...] = ()
    round: int | None = None

    @property
    def subject(self) -> Subject:
        """The checkpoint as its records name it."""
        return subject_of(self.checkpoint)


def subject_of(checkpoint: Checkpoint) -> Subject:
    """How records name a checkpoint: by its folder, since two folders of one `bench` never share a name."""
    manifest, variant = checkpoint.manifest, checkpoint.variant
    return Subject(
        name=checkpoint.path.name,
        base_model=manifest.base_model,
        variant=variant.name,
        method=variant.method,
        q_group_size=manifest.q_group_size,
        w_bit=variant.w_bit,
        version=variant.version,
        download=None,
        content_sha256=checkpoint.content_sha256,
        file_weights_bytes=manifest.weights_bytes,
        rounding=manifest.options.get("rounding"),
    )


def plan(
    checkpoints: Sequence[Checkpoint], scenarios: Sequence[Scenario], rounds: int, *, quality: bool = True
) -> list[PlannedRun]:
    """Every run, in order: base model by base model, first the latency rounds and then one quality run each.

    The rounds of A, B, C go A B C, C B A, A B C: a machine that drifts treats all alike, which A A A, B B B
    does not.
    """
    runs: list[PlannedRun] = []
    for base_model in dict.fromkeys(checkpoint.manifest.base_model for checkpoint in checkpoints):
        group = [checkpoint for checkpoint in checkpoints if checkpoint.manifest.base_model == base_model]
        for number in range(rounds):
            for checkpoint in group if number % 2 == 0 else reversed(group):
                runs.append(PlannedRun("latency", checkpoint, len(runs), tuple(scenarios), number))
        for checkpoint in group if quality else []:
            if checkpoint.manifest.source.kind == "dummy":
                continue  # random weights have no quality, and no tokenizer
            runs.append(PlannedRun("quality", checkpoint, len(runs)))
    return runs


RunKey = tuple[Kind, str, str, Scenario | None, int | None, str, str | None]


def missing(
    runs: Iterable[PlannedRun], records: Iterable[Record], *, device: str, compute_dtypes: Mapping[str, str]
) -> list[PlannedRun]:
    """What of the plan no ok record covers: runs without the scenarios that are done, in the plan's order.

    A record covers the same folder name with the same contents, scenario, round, device and compute dtype. A
    run that failed before is tried again. compute_dtypes: by base model.
    """
    done = {key_of(record) for record in records if record.status == "ok"}
    left = []
    for run in runs:
        dtype = compute_dtypes[run.checkpoint.manifest.base_model]
        if run.kind == "quality":
            if _key(run, None, device, dtype) not in done:
                left.append(run)
            continue
        scenarios = tuple(one for one in run.scenarios if _key(run, one, device, dtype) not in done)
        if scenarios:
            left.append(replace(run, scenarios=scenarios))
    return left


def planned_keys(runs: Iterable[PlannedRun], *, device: str, compute_dtypes: Mapping[str, str]) -> set[RunKey]:
    """The keys of the records that this plan leads to, one a scenario."""
    return {
        _key(run, scenario, device, compute_dtypes[run.checkpoint.manifest.base_model])
        for run in runs
        for scenario in run.scenarios or (None,)
    }


def key_of(record: Record) -> RunKey:
    """What a record is a measurement of: two records of one key are the same run, taken twice."""
    return (
        record.kind,
        record.subject.name,
        record.subject.content_sha256,
        record.scenario,
        record.round,
        record.device,
        record.compute_dtype,
    )


def _key(run: PlannedRun, scenario: Scenario | None, device: str, dtype: str) -> RunKey:
    subject = run.subject
    return (run.kind, subject.name, subject.content_sha256, scenario, run.round, device, dtype)
