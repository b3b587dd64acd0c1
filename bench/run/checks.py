"""What must hold before anything is measured, and where a bench's files lie. Imports no torch."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.environment import DECIDING, Environment, differences
from bench.records.record import Record, Subject
from bench.records.scenario import Scenario
from bench.records.store import holds_records, read_records
from bench.run.foreign import check_same_model
from bench.run.probe import Machine
from bench.worker.request import QualityRequest, Target
from quantize.checkpoint import is_model
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.variant import REFERENCE

KEPT_BYTES = 5 * 10**9  # of references' log-probabilities: those of SmolLM2 take 600 MB, of Llama 3.1 1.6 GB
BEGIN_AGAIN = "use --fresh to begin again, or --records for another file"


class MeasuredElsewhere(UserError):  # noqa: N818
    """A file has figures of another machine, or with other libraries: they do not stand in one table with new ones."""


def quality_request(data: str | None) -> QualityRequest:
    """What to judge on. Raises UserError for a text that cannot be read."""
    if data is None:
        return QualityRequest()
    from quantize.calibration import HUB_PREFIX, PARAGRAPH, text_from

    text = PARAGRAPH.join(text_from(data))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = data if data.startswith(HUB_PREFIX) else Path(data).name
    return QualityRequest(data=data if name == data else str(Path(data).resolve()), label=f"{name}, sha256 {digest}")


def expand_tasks(names: tuple[str, ...], folder: str | None) -> tuple[str, ...]:
    """The tasks asked for, groups taken apart. Raises UserError for one that lm-eval lacks, before anything runs."""
    if not names:
        return ()
    from bench.worker.tasks import expand, task_manager

    expanded = expand(names)
    with quiet_libraries():
        task_manager(expanded, Path(folder) if folder else None)
    return expanded


def check_models(targets: Sequence[Target], scenarios: Sequence[Scenario], quality: QualityRequest | None) -> None:
    """Raises UserError for a reference whose positions or tokenizer do not suit what is to be measured.

    And for another maker's checkpoint of other shapes, or another tokenizer. quality: None where nothing is judged. It
    reads the text and builds the models on the meta device: seconds."""
    texts: dict[str, Any] = {}
    for target in sorted(targets, key=lambda one: not one.subject.may_be_reference):
        subject, folder = target.subject, Path(target.checkpoint or "")
        if target.checkpoint is None or not (subject.may_be_reference or is_model(folder)):
            continue
        with quiet_libraries():
            from bench.worker.latency import check_positions
            from bench.worker.quality import evaluation_blocks
            from quantize.calibration import blocks_sha256, check_blocks
            from quantize.model.pretrained import empty_model, tokenizer_of

        try:
            tokenizer = tokenizer_of(folder) if target.has_text else None
            text = None
            if quality is not None and tokenizer is not None:
                size = {"blocks": quality.blocks, "block_tokens": quality.block_tokens}
                text = evaluation_blocks(tokenizer, **size, data=quality.data)
            if subject.may_be_reference:
                model = empty_model(folder)
                for scenario in scenarios:
                    check_positions(model, scenario)
                if text is not None:
                    check_blocks(text, model, "use --no-quality")
                    texts[subject.baseline] = blocks_sha256(text)
            elif text is not None and texts.get(subject.baseline) not in (None, blocks_sha256(text)):
                advice = "copy the tokenizer files of its base model into it"
                raise UserError(f"its tokenizer gives other ids than that of {subject.baseline}: {advice}")
        except UserError as error:
            raise UserError(f"{subject.name}: {error}") from None
    bases = {one.subject.baseline: one for one in targets if one.subject.may_be_reference and one.checkpoint}
    for target in targets:
        base = bases.get(target.subject.baseline)
        if base and base is not target and target.checkpoint and is_model(Path(target.checkpoint)):
            check_same_model(target, base.subject, base.checkpoint or "")


def check_references(targets: Sequence[Target], sources: Sequence[str], folder: Path) -> None:
    """Raises UserError, saying what to do, for a target without a reference. sources: as `quantize` takes them."""
    references = {target.subject.baseline: target.subject for target in targets if target.subject.may_be_reference}
    for target, source in zip(targets, sources, strict=True):
        reference = references.get(target.subject.baseline)
        if reference is None:
            command = f"quantize {source} --variant {REFERENCE.name} --out {folder}"
            raise UserError(f"{folder} holds no reference of {target.subject.baseline}: make it with `{command}`")
        if target.subject.source_sha256 != reference.source_sha256:
            said = f"{target.subject.name} was made from other weights than its reference {reference.name}"
            raise UserError(f"{said}: give one model another name with `quantize --name`, or keep them in two folders")


def check_continues(
    path: Path, old: Sequence[Record], machine: Machine, targets: Iterable[Target], quality: QualityRequest | None
) -> None:
    """Raises UserError where the file has figures of another machine, other libraries, contents or text."""
    contents = {target.subject.name: target.subject.content_sha256 for target in targets}
    for record in old:
        name, text = record.subject.name, record.quality and record.quality.text
        if contents.get(name, record.subject.content_sha256) != record.subject.content_sha256:
            raise UserError(f"{name} is not what {path} has records of: {BEGIN_AGAIN}")
        if record.device == machine.device and (found := differences(record.environment, machine.environment)):
            raise MeasuredElsewhere(f"{path} was measured elsewhere ({found[0]}): {BEGIN_AGAIN}")
        if quality and text and text != quality.label:
            raise UserError(f"{path} holds perplexities on another text ({text}, now {quality.label}): {BEGIN_AGAIN}")


def compute_dtypes(targets: Iterable[Target], machine: Machine, dtype: str | None, old: list[Record]) -> dict[str, str]:
    """The compute dtype of each baseline's runs, quantized or not: one, so that the rows compare.

    On a CPU what the probe found, or had found when the records were begun; on a GPU the reference's half dtype."""
    begun = [record.environment.cpu_dtype for record in old if record.device == machine.device]
    chosen = dtype or next((one for one in begun if one), None) or machine.environment.cpu_dtype
    references = (target for target in targets if target.subject.may_be_reference)
    return {target.subject.baseline: chosen or target.half_dtype for target in references}


def records_to_continue(path: Path, *, fresh: bool) -> list[Record]:
    """What the file holds; nothing where it is to be set aside. Raises UserError for a file that holds no records."""
    if path.exists() and fresh and not holds_records(path):
        raise UserError(f"{path} holds no records: give --records another name")
    return read_records(path) if path.exists() and not fresh else []


def set_aside(path: Path) -> None:
    """Rename the file, where there is one, to the first free name with a number."""
    if path.exists():
        numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(aside for aside in numbered if not aside.exists()))


def reference_logprobs_paths(
    targets: Iterable[Target], dtypes: dict[str, str], label: str, environment: Environment
) -> dict[str, str]:
    """Each reference's file of log-probabilities, by quality baseline."""
    references = (target.subject for target in targets if target.subject.may_be_reference)
    found: dict[str, str] = {}
    for one in references:
        found.setdefault(one.quality_baseline, logprobs_path(one, dtypes[one.baseline], label, environment))
    return found


def logprobs_path(subject: Subject, dtype: str, label: str, environment: Environment) -> str:
    """Where a checkpoint's log-probabilities on a text are kept: another file for whatever decides what is in it."""
    facts = {name: getattr(environment, name) for name in DECIDING} | environment.libraries
    key = json.dumps((subject.engine, subject.kernel, subject.content_sha256, dtype, label, facts), sort_keys=True)
    name = f"{subject.base_model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    return str((reference_logprobs_folder() / name).resolve())


def reference_logprobs_folder() -> Path:
    """Where what references expect is kept between benches, the record of its quality beside each."""
    from quantize.source import cache_folder

    return cache_folder() / "expectations"


def kept_qualities(paths: Mapping[str, str]) -> list[Record]:
    """The references' records of quality that were left beside their log-probabilities."""
    beside = [Path(path).with_suffix(".jsonl") for path in paths.values() if Path(path).is_file()]
    return [record for path in beside if path.is_file() for record in read_records(path)]


def forget_old_logprobs(used: Iterable[str]) -> None:
    """Delete the files that were not used for longest, until the others take no more than KEPT_BYTES."""
    for path in map(Path, used):
        if path.is_file():
            os.utime(path)
    found = sorted(reference_logprobs_folder().glob("*.npy"), key=lambda path: -path.stat().st_mtime)
    total = 0
    for path in found:
        total += path.stat().st_size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)
            path.with_suffix(".jsonl").unlink(missing_ok=True)
