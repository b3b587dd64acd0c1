"""Which records may stand in one table; what matters of the fingerprint is said in bench.records.environment."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import NoReturn

from bench.records.environment import differences
from bench.records.record import Record, Subject
from bench.records.scenario import Scenario
from quantize.errors import UserError

ADVICE = "measure them together with `bench --fresh`, or keep their records apart"


def check_subjects(records: Iterable[Record]) -> None:
    """Raises UserError, naming the field, when one name stands for two checkpoints."""
    known: dict[str, Subject] = {}
    for record in records:
        first = known.setdefault(record.subject.name, record.subject)
        if first == record.subject:
            continue
        if first.content_sha256 != record.subject.content_sha256:
            raise UserError(
                f"the records of {first.name} come from two different checkpoints (content_sha256 "
                f"{first.content_sha256[:12]} against {record.subject.content_sha256[:12]}): "
                "measure again with `bench --fresh`"
            )
        ours, theirs = asdict(first), asdict(record.subject)
        field = next(name for name in ours if ours[name] != theirs[name])
        raise UserError(
            f"the records of {first.name} disagree on {field} ({ours[field]} against {theirs[field]}): {ADVICE}"
        )


def check_alike(records: Sequence[Record]) -> None:
    """Raises UserError, naming the field, when these records, all of one device, were not measured alike.

    Compared are what decides in the fingerprint (processor, GPU, threads, library versions), what the memory
    figures mean, and the text behind the perplexity.
    """
    good = [record for record in records if record.status == "ok"]
    for record in good[1:]:
        found = differences(good[0].environment, record.environment)
        if found:
            _refuse(good[0], record, found[0])
    prompts: dict[tuple[str, Scenario | None], Record] = {}
    for record in good:
        if record.prompt_sha256 is not None:
            first = prompts.setdefault((record.subject.baseline, record.scenario), record)
            if first.prompt_sha256 != record.prompt_sha256:
                _refuse(first, record, f"prompt_sha256: {first.prompt_sha256} against {record.prompt_sha256}")
    memory = [(record, record.memory) for record in good if record.memory is not None]
    for record, figures in memory[1:]:
        if figures.source != memory[0][1].source:
            _refuse(memory[0][0], record, f"memory.source: {memory[0][1].source} against {figures.source}")
    quality = [(record, record.quality) for record in good if record.quality is not None]
    for record, found_quality in quality[1:]:
        for field in ("text_sha256", "tokens"):
            ours, theirs = getattr(quality[0][1], field), getattr(found_quality, field)
            if ours != theirs:
                _refuse(quality[0][0], record, f"quality.{field}: {ours} against {theirs}")


def refuse_compute_dtype(variant: Record, references: Sequence[Record]) -> NoReturn:
    """Raise UserError for a variant whose reference ran only with another compute dtype."""
    dtypes = sorted({str(record.compute_dtype) for record in references})
    _refuse(references[0], variant, f"compute_dtype: {' and '.join(dtypes)} against {variant.compute_dtype}")


def refuse_scenarios(one: Scenario, other: Scenario) -> NoReturn:
    """Raise UserError for two scenarios under the one name that a column of the table stands for."""
    ours, theirs = asdict(one), asdict(other)
    field = next(name for name in ours if ours[name] != theirs[name])
    raise UserError(
        f"the records hold two scenarios called {one.name!r} ({field}: {ours[field]} against {theirs[field]}): {ADVICE}"
    )


def _refuse(one: Record, other: Record, difference: str) -> NoReturn:
    whose = [one.subject.name, other.subject.name]
    if whose[0] == whose[1]:
        raise UserError(f"records of {whose[0]} were not measured alike ({difference}): {ADVICE}")
    raise UserError(f"{whose[0]} and {whose[1]} were not measured alike ({difference}): {ADVICE}")
