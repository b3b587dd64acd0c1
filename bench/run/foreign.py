"""Targets that `quantize` did not make: other makers' checkpoints, and the base model that each is judged against.

Imports torch where there are some, and not before.
"""

from pathlib import Path

from bench.records.record import Subject
from bench.run.plan import target_of
from bench.worker.request import Target
from quantize.checkpoint import MANIFEST_NAME, SourceFacts, find_checkpoints, is_model, open_checkpoint
from quantize.errors import UserError
from quantize.quiet import quiet_libraries
from quantize.variant import REFERENCE


def folder_of(place: Path) -> Path:
    """Where `bench PLACE` finds checkpoints: the folder, or what a hub id stands for once it is downloaded."""
    if place.exists() or str(place).count("/") != 1:
        return place
    from quantize.source import HUB_ID, download

    return download(str(place))[0] if HUB_ID.fullmatch(str(place)) else place


def foreign_folders(directory: Path) -> list[Path]:
    """The folder itself where a model lies in it, else its subfolders with one that `quantize` did not make."""
    if is_model(directory):
        return [directory]
    return [one for one in sorted(directory.iterdir()) if one.is_dir() and one.name[0] != "." and is_model(one)]


def foreign_targets(directory: Path, ours: list[Target], reference: str | None, kernel: str | None) -> list[Target]:
    """Other makers' checkpoints in a folder, and the references that they need beside `ours`.

    reference: as the user names the base model: a folder, a checkpoint of ours in half precision, or a hub id. Else the
    one that a checkpoint's card names, or the one reference there is. Raises UserError where there is none, or it is
    another model."""
    from quantize.foreign import base_in_card, foreign_checkpoint
    from quantize.weights import quantization_config

    known = {target.checkpoint: target for target in ours if target.subject.may_be_reference}
    found: list[Target] = []
    folders = foreign_folders(directory)
    plain = [folder for folder in folders if quantization_config(folder) is None]
    known |= {base.checkpoint: base for base in (_reference(str(folder), kernel) for folder in plain)}
    for folder in (one for one in folders if one not in plain):
        named = reference or base_in_card(folder)
        if named is None and len(known) != 1:
            raise UserError(f"{folder} does not say which model it was made from: name that with --reference")
        base = _reference(named, kernel) if named else next(iter(known.values()))
        same = (one for one in known.values() if one.subject.source_sha256 == base.subject.source_sha256)
        base = next(same, base)
        known.setdefault(base.checkpoint, base)
        source = SourceFacts("folder", base.subject.base_model, None, base.subject.source_sha256)
        checkpoint = foreign_checkpoint(folder, base_model=base.subject.base_model, source=source, hashed=True)
        found.append(target_of(checkpoint, kernel=kernel, name=checkpoint.manifest.name))
    own = {target.checkpoint for target in ours}
    return [*(one for place, one in known.items() if place not in own), *found]


def _reference(named: str, kernel: str | None) -> Target:
    """The base model as a target in half precision."""
    from quantize.foreign import foreign_checkpoint
    from quantize.source import open_source

    path = Path(named)
    if path.is_dir() and not is_model(path):
        ours = [open_checkpoint(path)] if (path / MANIFEST_NAME).is_file() else find_checkpoints(path)
        checkpoints = [one for one in ours if one.variant == REFERENCE]
        if len(checkpoints) != 1:
            raise UserError(f"{named} holds {len(checkpoints)} half-precision models: name the folder of one")
        return target_of(checkpoints[0], kernel=kernel)
    source = open_source(named)
    checkpoint = foreign_checkpoint(source.folder, base_model=source.base_model, source=source.facts, hashed=True)
    return target_of(checkpoint, name=f"{source.base_model}-{REFERENCE.method}")


def check_same_model(target: Target, reference: Subject, folder: str) -> None:
    """Raise UserError where a checkpoint and its base model differ in shapes or vocabulary."""
    with quiet_libraries():
        from quantize.model.pretrained import config_of, empty_model

        shapes = []
        for place in map(Path, (target.checkpoint or "", folder)):
            config = config_of(place)
            vars(config).pop("quantization_config", None)
            model = empty_model(place, config=config)
            shapes.append({name: list(tensor.shape) for name, tensor in model.named_parameters()})
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        mine, theirs = (one.get(name, "none") for one in shapes)
        if mine != theirs:
            wrong = f"{target.subject.name} was not made from {reference.base_model}"
            where = f"{name} is {mine} here and {theirs} there"
            raise UserError(f"{wrong}: {where}: name its base model with --reference")
