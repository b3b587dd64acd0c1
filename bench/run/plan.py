"""What to run, in which order, and what of it is still missing. Pure functions; imports no torch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.records.record import Kind, Record, Subject, family_of, may_be_reference
from bench.records.scenario import Scenario
from bench.run.target import Candidate

Work = tuple[Kind, Scenario | None]
QUALITY: Work = ("quality", None)
TASKS: Work = ("tasks", None)


@dataclass(frozen=True)
class PlannedRun:
    """One process: a candidate with all scenarios of one round, then its quality and its tasks where asked for.

    position counts the runs of the whole plan from 0, so that a figure can be held against the time it was
    taken. tasks: names of lm-eval. is_reference: of several half-precision checkpoints the first alone.
    """

    candidate: Candidate
    position: int
    scenarios: tuple[Scenario, ...] = ()
    round: int | None = None
    quality: bool = False
    tasks: tuple[str, ...] = ()
    is_reference: bool = False

    @property
    def works(self) -> tuple[Work, ...]:
        """What it leaves records of, in order."""
        works: list[Work] = [("latency", scenario) for scenario in self.scenarios]
        return (*works, *([QUALITY] if self.quality else []), *([TASKS] if self.tasks else []))

    @property
    def subject(self) -> Subject:
        """The candidate as its records name it."""
        return self.candidate.subject

    @property
    def family(self) -> str:
        """The base model whose reference it is compared with."""
        return family_of(self.subject)


def plan(
    candidates: Sequence[Candidate],
    scenarios: Sequence[Scenario],
    rounds: Iterable[int],
    *,
    quality: bool = True,
    tasks: Sequence[str] = (),
) -> list[PlannedRun]:
    """Every run of these rounds, in order: family by family (bench.records.record.family_of), round by round.

    The rounds of A, B, C go A B C, C B A, A B C: a machine that drifts treats all alike, which A A A, B B B
    does not. The first round's processes measure the quality too, and the tasks, after their latencies; the reference
    comes first there, since the others are held against it.
    """
    runs: list[PlannedRun] = []
    for family in dict.fromkeys(family_of(candidate.subject) for candidate in candidates):
        group = sorted(
            (candidate for candidate in candidates if family_of(candidate.subject) == family),
            key=lambda candidate: not may_be_reference(candidate.subject),
        )
        for number in rounds:
            for candidate in group if number % 2 == 0 else reversed(group):
                judged = number == 0 and candidate.has_text
                runs.append(
                    PlannedRun(
                        candidate,
                        len(runs),
                        tuple(scenarios),
                        number,
                        quality=judged and quality,
                        tasks=tuple(tasks) if judged else (),
                        is_reference=candidate is group[0] and may_be_reference(candidate.subject),
                    )
                )
    return runs


RunKey = tuple[Kind, str, str, Scenario | None, int | None, str, str | None]


def missing(
    runs: Iterable[PlannedRun], records: Iterable[Record], *, device: str, compute_dtypes: Mapping[str, str]
) -> list[PlannedRun]:
    """What of the plan no ok record covers: runs without the work that is done, in the plan's order.

    A record covers the same folder name with the same contents, scenario, round, device and compute dtype. A
    run that failed before is tried again. compute_dtypes: by family.
    """
    done: dict[RunKey, Record] = {key_of(record): record for record in records if record.status == "ok"}
    left = []
    for run in runs:
        dtype = compute_dtypes[run.family]
        open_works = [work for work in run.works if not _covers(done.get(_key(run, work, device, dtype)), run)]
        if open_works:
            scenarios = tuple(one for one in run.scenarios if ("latency", one) in open_works)
            tasks = run.tasks if TASKS in open_works else ()
            left.append(replace(run, scenarios=scenarios, quality=QUALITY in open_works, tasks=tasks))
    return left


def _covers(record: Record | None, run: PlannedRun) -> bool:
    if record is None or record.tasks is None:
        return record is not None
    return set(run.tasks) <= {score.name for score in record.tasks}


def with_references(left: Sequence[PlannedRun], runs: Sequence[PlannedRun], kept: Collection[str]) -> list[PlannedRun]:
    """`left`, and the reference's quality before it where others will be held against what it expects.

    Quality is a matter of the base model, not of the family: what another model expects says nothing of a
    quantization. kept: the base models whose reference's expectations are on disk still.
    """
    needed = {run.subject.base_model for run in left if run.quality and not run.is_reference} - {
        run.subject.base_model for run in left if run.quality and run.is_reference
    }
    again = [
        replace(run, scenarios=(), tasks=(), round=None)
        for run in runs
        if run.is_reference and run.quality and run.subject.base_model in needed - set(kept)
    ]
    return [*again, *left]


def planned_keys(runs: Iterable[PlannedRun], *, device: str, compute_dtypes: Mapping[str, str]) -> set[RunKey]:
    """The keys of the records that this plan leads to."""
    return {_key(run, work, device, compute_dtypes[run.family]) for run in runs for work in run.works}


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


def _key(run: PlannedRun, work: Work, device: str, dtype: str) -> RunKey:
    subject, (kind, scenario) = run.subject, work
    number = run.round if kind == "latency" else None
    return (kind, subject.name, subject.content_sha256, scenario, number, device, dtype)
