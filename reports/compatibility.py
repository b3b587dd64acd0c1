"""Which records may stand in one table; what matters of the fingerprint is said in bench.records.environment."""

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from bench.records.comparison import grouped
from bench.records.environment import differences
from bench.records.record import Record, Subject
from bench.records.scenario import Scenario
from quantize.errors import UserError

ADVICE = "measure them together with `bench --fresh`, or keep their records apart"


def check_subjects(records: Iterable[Record]) -> None:
    """Raises UserError, naming the field, when one name stands for two checkpoints, or for two base models."""
    known: dict[str, Subject] = {}
    sources: dict[str, Subject] = {}
    for own in (record.subject for record in records):
        if own.source_sha256 is not None:
            other = sources.setdefault(own.base_model, own)
            if other.source_sha256 != own.source_sha256:
                said = f"{other.name} and {own.name} were made from two models that are both called {own.base_model}"
                raise UserError(f"{said}: keep their records apart, or make one again with `quantize --name`")
        first = known.setdefault(own.name, own)
        if first.content_sha256 != own.content_sha256:
            hashes = f"content_sha256 {first.content_sha256[:12]} against {own.content_sha256[:12]}"
            said = f"the records of {first.name} come from two different checkpoints ({hashes})"
            raise UserError(f"{said}: measure again with `bench --fresh`")
        if first != own:
            field, ours, theirs = _first_difference(first, own)
            raise UserError(f"the records of {first.name} disagree on {field} ({ours} against {theirs}): {ADVICE}")


def check_alike(records: Sequence[Record]) -> None:
    """Raises UserError, naming the field, when these records, all of one device, were not measured alike.

    Compared are what decides in the fingerprint (processor, GPU, threads, library versions), what the memory
    figures mean, and the text behind the perplexity.
    """
    good = [record for record in records if record.status == "ok"]
    for record in good[1:]:
        if found := differences(good[0].environment, record.environment):
            _refuse(good[0], record, found[0])
    prompts = [(one, one.prompt_sha256) for one in good if one.prompt_sha256 is not None]
    _check_field("prompt_sha256", prompts, lambda one: (one.subject.baseline, one.scenario))
    _check_field("memory.source", [(one, one.memory.source) for one in good if one.memory])
    _check_field("quality.text_sha256", [(one, one.quality.text_sha256) for one in good if one.quality])
    _check_field("quality.tokens", [(one, one.quality.tokens) for one in good if one.quality])


def _check_field(
    name: str, found: Iterable[tuple[Record, object]], group: Callable[[Record], object] = lambda one: None
) -> None:
    """Refuse the first record whose value is not that of the first one in its group."""
    firsts: dict[object, tuple[Record, object]] = {}
    for record, value in found:
        first, expected = firsts.setdefault(group(record), (record, value))
        if value != expected:
            _refuse(first, record, f"{name}: {expected} against {value}")


def check_compute_dtypes(good: Sequence[Record]) -> None:
    """Raises UserError for a checkpoint whose reference ran on the same device, but only in another compute dtype."""
    may_be = (record for record in good if record.subject.may_be_reference)
    references = grouped(may_be, lambda record: (record.device, record.subject.baseline))
    dtypes = {key: {str(one.compute_dtype) for one in found} for key, found in references.items()}
    for record in good:
        key = (record.device, record.subject.baseline)
        if key in dtypes and str(record.compute_dtype) not in dtypes[key]:
            theirs = " and ".join(sorted(dtypes[key]))
            _refuse(references[key][0], record, f"compute_dtype: {theirs} against {record.compute_dtype}")


def refuse_scenarios(one: Scenario, other: Scenario) -> NoReturn:
    """Raise UserError for two scenarios under the one name that a column of the table stands for."""
    field, ours, theirs = _first_difference(one, other)
    raise UserError(f"the records hold two scenarios called {one.name!r} ({field}: {ours} against {theirs}): {ADVICE}")


def _first_difference(one: object, other: object) -> tuple[str, object, object]:
    """The first field in which two unequal objects of a class differ, and its two values."""
    return next((name, ours, vars(other)[name]) for name, ours in vars(one).items() if ours != vars(other)[name])


def _refuse(one: Record, other: Record, difference: str) -> NoReturn:
    names = list(dict.fromkeys((one.subject.name, other.subject.name)))
    whose = f"records of {names[0]}" if len(names) == 1 else " and ".join(names)
    raise UserError(f"{whose} were not measured alike ({difference}): {ADVICE}")
