"""What must hold before anything is measured, and where a bench's files lie. Imports no torch."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.records.environment import differences
from bench.records.record import Record
from bench.records.scenario import Scenario
from bench.records.store import holds_records, read_records
from bench.run.probe import Machine
from bench.worker.request import QualityRequest, Target
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.variant import REFERENCE

BEGIN_AGAIN = "use --fresh to begin again, or --records for another file"


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


def check_models(targets: Iterable[Target], scenarios: Sequence[Scenario], quality: QualityRequest | None) -> None:
    """Raises UserError for a reference whose positions or tokenizer do not suit what is to be measured and judged."""
    for target in targets:
        if not target.subject.may_be_reference or target.checkpoint is None:
            continue
        with quiet_libraries():
            from bench.worker.latency import check_positions
            from bench.worker.quality import evaluation_blocks
            from quantize.calibration import check_blocks
            from quantize.model.pretrained import empty_model, tokenizer_of

        folder = Path(target.checkpoint)
        try:
            model = empty_model(folder)
            for scenario in scenarios:
                check_positions(model, scenario)
            tokenizer = tokenizer_of(folder) if target.has_text else None
            if quality is not None and tokenizer is not None:
                size = {"blocks": quality.blocks, "block_tokens": quality.block_tokens}
                check_blocks(evaluation_blocks(tokenizer, **size, data=quality.data), model, "use --no-quality")
        except UserError as error:
            raise UserError(f"{target.subject.name}: {error}") from None


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
            raise UserError(f"{path} was measured elsewhere ({found[0]}): {BEGIN_AGAIN}")
        if quality and text and text != quality.label:
            raise UserError(f"{path} holds perplexities on another text ({text}, now {quality.label}): {BEGIN_AGAIN}")


def compute_dtypes(
    targets: Iterable[Target], machine: Machine, dtype: str | None, old: Sequence[Record]
) -> dict[str, str]:
    """The compute dtype of each baseline's runs, quantized or not: one, so that the rows compare.

    On a CPU it is what the probe found, or what it had found when the records were begun; on a GPU the reference's
    half dtype.
    """
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


def reference_logprobs_folder(path: Path) -> Path:
    """Where a bench that writes these records keeps what its references expect."""
    return path.with_suffix(".expectations")


def reference_logprobs_paths(
    path: Path, targets: Iterable[Target], dtypes: dict[str, str], label: str
) -> dict[str, str]:
    """Each reference's file of log-probabilities, by base model: another file for other contents or text."""
    found: dict[str, str] = {}
    for subject in (target.subject for target in targets):
        if subject.may_be_reference:
            key = f"{subject.content_sha256} {dtypes[subject.baseline]} {label}"
            name = f"{subject.base_model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
            found.setdefault(subject.base_model, str((reference_logprobs_folder(path) / name).resolve()))
    return found
