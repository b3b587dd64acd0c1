"""Which records may stand in one table; what matters of the fingerprint is said in bench.records.environment."""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from bench.records.comparison import grouped
from bench.records.environment import differences
from bench.records.record import Record, Subject
from bench.records.scenario import SCENARIOS
from quantize.errors import UserError

HEADLINE = SCENARIOS["published"].name  # the scenario behind the column Time
ADVICE = "measure them together with `bench --fresh`, or keep their records apart"


def check_subjects(records: Iterable[Record]) -> None:
    """Raises UserError, naming the field, when one name stands for two checkpoints, or for two base models."""
    known, sources = dict[str, Subject](), dict[str, Subject]()
    for subject in (record.subject for record in records):
        base, name = subject.base_model, subject.name
        other = sources.setdefault(base, subject) if subject.source_sha256 else subject
        if other.source_sha256 != subject.source_sha256:
            said = f"{other.name} and {name} were made from two models that are both called {base}"
            raise UserError(f"{said}: keep their records apart, or make one again with `quantize --name`")
        first = known.setdefault(name, subject)
        if first.content_sha256 != subject.content_sha256:
            hashes = f"content_sha256 {first.content_sha256[:12]} against {subject.content_sha256[:12]}"
            said = f"the records of {name} come from two different checkpoints ({hashes})"
            raise UserError(f"{said}: measure again with `bench --fresh`")
        if first != subject:
            raise UserError(f"the records of {name} disagree {_first_difference(first, subject)}: {ADVICE}")


def check_alike(records: Sequence[Record]) -> None:
    """Raises UserError, naming the field, for records of one device that were not measured alike."""
    headlines = list(dict.fromkeys(one.scenario for one in records if one.scenario and one.scenario.name == HEADLINE))
    if len(headlines) > 1:
        difference = _first_difference(*headlines[:2])
        raise UserError(f"the records hold two scenarios called {HEADLINE!r} {difference}: {ADVICE}")
    good = [record for record in records if record.status == "ok"]
    for record in good[1:]:
        if found := differences(good[0].environment, record.environment):
            _refuse(good[0], record, found[0])
    prompts = [(one, one.prompt_sha256, (one.subject.baseline, one.scenario)) for one in good if one.prompt_sha256]
    _check_same("prompt_sha256", prompts)
    _check_same("memory.source", [(one, one.memory.source, None) for one in good if one.memory])
    _check_same("quality.text_sha256", [(one, one.quality.text_sha256, None) for one in good if one.quality])
    _check_same("quality.tokens", [(one, one.quality.tokens, None) for one in good if one.quality])


def _check_same(name: str, found: Iterable[tuple[Record, object, object]]) -> None:
    """Refuse the first record whose value is not that of the first one in its group: record, value, group."""
    firsts: dict[object, tuple[Record, object]] = {}
    for record, value, group in found:
        first, expected = firsts.setdefault(group, (record, value))
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


def _first_difference(one: object, other: object) -> str:
    """The first field in which two unequal objects of a class differ, and its two values."""
    pairs = ((name, ours, vars(other)[name]) for name, ours in vars(one).items())
    return next(f"({name}: {ours} against {theirs})" for name, ours, theirs in pairs if ours != theirs)


def _refuse(one: Record, other: Record, difference: str) -> NoReturn:
    names = list(dict.fromkeys((one.subject.name, other.subject.name)))
    whose = f"records of {names[0]}" if len(names) == 1 else " and ".join(names)
    raise UserError(f"{whose} were not measured alike ({difference}): {ADVICE}")
