"""What to run, in which order, and what of it is still missing. Imports no torch."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.records.comparison import grouped
from bench.records.record import Kind, Record, Subject, name_on
from bench.records.scenario import Scenario
from bench.worker.request import QUALITY, TASKS, PlannedRun, Target, Work
from quantize.checkpoint import Checkpoint
from quantize.variant import AUTO_KERNEL, Variant

OURS = "quantable"  # what `--engine` calls this program


def target_of(
    checkpoint: Checkpoint, *, kernel: str | None = None, family: str | None = None, name: str | None = None
) -> Target:
    """A checkpoint on disk, by its folder's name: two folders of one `bench` never share one.

    kernel: what AWQ layers shall run on, as quantize.load takes it; others have no choice."""
    manifest, variant = checkpoint.manifest, checkpoint.variant
    made: dict[str, Any] = {"base_model": manifest.base_model, "q_group_size": manifest.q_group_size}
    made |= {"content_sha256": checkpoint.content_sha256, "source_sha256": manifest.source.weights_sha256}
    made |= {"file_weights_bytes": manifest.weights_bytes, "rounding": manifest.options.get("rounding")}
    kernel = kernel if variant.is_awq else None
    subject = subject_of(variant, name=name or checkpoint.path.name, kernel=kernel, family=family, **made)
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    found: dict[str, Any] = {"has_text": manifest.source.kind != "dummy", "quantized_share": manifest.quantized_share}
    return Target(subject, str(checkpoint.path.resolve()), half_dtype=half_dtype(config), **found)


def in_engine(target: Target, engine: str) -> Target:
    """The same checkpoint as an engine runs it: a row of its own, beside that engine's reference."""
    subject = replace(target.subject, name=name_on(target.subject.name, None, engine), engine=engine)
    return target if engine == OURS else replace(target, subject=subject)


def subject_of(variant: Variant, *, name: str, kernel: str | None, **fields: Any) -> Subject:
    """A subject of this variant, `fields` being Subject's; on a kernel of the user's choice it is a row of its own."""
    fields |= {"variant": variant.name, "method": variant.method, "w_bit": variant.w_bit, "version": variant.version}
    chosen = None if kernel == AUTO_KERNEL else kernel
    return Subject(name=name_on(name, kernel), kernel=chosen, download=None, **fields)


def half_dtype(config: Mapping[str, Any]) -> str:
    """bfloat16 where a model's config says so, else float16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if named == "bfloat16" else "float16"


def plan(
    targets: Sequence[Target],
    scenarios: Sequence[Scenario],
    rounds: Iterable[int],
    *,
    quality: bool = True,
    tasks: Sequence[str] = (),
) -> list[PlannedRun]:
    """Every run of these rounds, in order: model by model, round by round, a model's engines in turn.

    The rounds of A, B, C go A B C, C B A, A B C, so that a machine that drifts treats all alike. The first round's
    processes measure the quality too, and the tasks, after their latencies; the reference comes first there, since the
    others are compared with it. Another engine gets what every engine does."""
    runs: list[PlannedRun] = []
    for group in grouped(targets, lambda one: one.subject.family or one.subject.base_model).values():
        of_engine = grouped(group, lambda one: one.subject.baseline)
        for some in of_engine.values():
            some.sort(key=lambda target: not target.subject.may_be_reference)
        group = [target for some in of_engine.values() for target in some]
        firsts = [some[0] for some in of_engine.values()]
        for number in rounds:
            for target in group if number % 2 == 0 else reversed(group):
                judged = number == 0 and target.has_text
                asked: dict[str, Any] = {"quality": judged and quality, "tasks": tuple(tasks) if judged else ()}
                is_reference = target.subject.may_be_reference and any(target is one for one in firsts)
                works = tuple(one for one in scenarios if target.subject.engine is None or one.is_plain)
                runs.append(PlannedRun(target, len(runs), works, number, is_reference=is_reference, **asked))
    return runs


RunKey = tuple[Kind, str, str, Scenario | None, int | None, str, str | None]


def missing(
    runs: Iterable[PlannedRun], records: Iterable[Record], *, device: str, compute_dtypes: Mapping[str, str]
) -> list[PlannedRun]:
    """What of the plan no ok record covers: runs without the work that is done, in the plan's order.

    A record covers the same folder name with the same contents, scenario, round, device and compute dtype. A
    run that failed before is tried again. compute_dtypes: by baseline."""
    done = {key_of(record): record for record in records if record.status == "ok"}
    left = []
    for run in runs:
        dtype = compute_dtypes[run.subject.baseline]
        open_works = [work for work in run.works if not _covers(done.get(_key(run, work, device, dtype)), run)]
        if open_works:
            scenarios = tuple(one for one in run.scenarios if ("latency", one) in open_works)
            tasks = run.tasks if TASKS in open_works else ()
            left.append(replace(run, scenarios=scenarios, quality=QUALITY in open_works, tasks=tasks))
    return left


def _covers(record: Record | None, run: PlannedRun) -> bool:
    return record is not None and (record.tasks is None or set(run.tasks) <= {score.name for score in record.tasks})


def with_references(left: Sequence[PlannedRun], runs: Sequence[PlannedRun], kept: Collection[str]) -> list[PlannedRun]:
    """`left`, and the reference's quality before it where others will be compared with what it expects.

    Quality is a matter of the base model, not of the baseline: what another model expects says nothing of a
    quantization. kept: the quality baselines whose reference's log-probabilities are on disk."""
    judged = [run for run in left if run.quality]
    needed = {run.subject.quality_baseline for run in judged} - set(kept)
    needed -= {run.subject.quality_baseline for run in judged if run.is_reference}
    judges = [run for run in runs if run.is_reference and run.quality and run.subject.quality_baseline in needed]
    return [*(replace(run, scenarios=(), tasks=(), round=None) for run in judges), *left]


def planned_keys(runs: Iterable[PlannedRun], *, device: str, compute_dtypes: Mapping[str, str]) -> set[RunKey]:
    """The keys of the records that this plan leads to."""
    return {_key(run, work, device, compute_dtypes[run.subject.baseline]) for run in runs for work in run.works}


def key_of(record: Record) -> RunKey:
    """What a record is a measurement of: two records of one key are the same run, taken twice."""
    subject, where = record.subject, (record.device, record.compute_dtype)
    return (record.kind, subject.name, subject.content_sha256, record.scenario, record.round, *where)


def _key(run: PlannedRun, work: Work, device: str, dtype: str) -> RunKey:
    number = run.round if work[0] == "latency" else None
    return (work[0], run.subject.name, run.subject.content_sha256, work[1], number, device, dtype)
