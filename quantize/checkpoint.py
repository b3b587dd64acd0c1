"""A checkpoint on disk: its layout, its manifest, atomic writing and verification. Imports no torch.

A finished checkpoint is a folder that other software reads (config.json, safetensors, tokenizer) plus
`quantable.json`, the manifest, which is written last and holds the SHA-256 of every other file.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import disk_is_full, hash_of_hashes, remove_working_folder, replace_file, sha256_of
from quantize.schema import Count, Share, from_json, to_data
from quantize.variant import Variant, known_variants

MANIFEST_NAME, MANIFEST_SCHEMA = "quantable.json", 1
CARD_NAME, PLOT_NAME = "README.md", "pareto.png"
CARD_FILES = (CARD_NAME, PLOT_NAME, "LICENSE*", "NOTICE*")
"""What people read of a checkpoint. No model depends on them, so they may come, change and go without it."""


@dataclass(frozen=True)
class SourceFacts:
    """Where the weights came from.

    kind:           "hub", "folder", "embedded", "merge" or "dummy".
    id:             what the user named.
    revision:       the hub commit, else None.
    weights_sha256: hash over names and contents of the source's weight files, None for dummy weights.
    merge:          of a merge its recipe, seed, mergekit's version, and the hash of each of its sources."""

    kind: str
    id: str
    revision: str | None
    weights_sha256: str | None
    merge: dict[str, Any] | None = None


@dataclass(frozen=True)
class CalibrationFacts:
    """The text that calibration looked at.

    text: where from; blocks: how many; block_tokens: of how many tokens; sha256: of their token ids."""

    text: str
    blocks: int
    block_tokens: int
    sha256: str


@dataclass(frozen=True)
class FileFacts:
    """One file of the checkpoint. bytes: its size; sha256: of its contents."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `quantable.json` says: how this checkpoint came to be and what its files should hold.

    name:           the checkpoint's folder; base_model: as the table names it.
    variant:        a name of known_variants().
    q_group_size:   of groups of codes, None where there are none.
    source:         where the weights came from.
    calibration:    the text that was looked at, None for none.
    options:        the settings that decided the bytes.
    libraries:      versions of those that made it.
    seconds:        wall-clock seconds a phase; created: ISO 8601, UTC.
    weights_bytes:  of the tensors in the safetensors files, not their headers.
    files:          every other file in the folder.
    quantized_share: of the decoder's matrices, None where nothing is quantized.
    layers:         what the search found of each quantized linear layer, empty where there was no search.
    estimate:       what the run was expected to take, where it was estimated; measured: what it took.
    schema_version: of this file."""

    name: str
    base_model: str
    variant: str
    q_group_size: int | None
    source: SourceFacts
    calibration: CalibrationFacts | None
    options: dict[str, Any]
    libraries: dict[str, str]
    seconds: dict[str, float]
    created: str
    weights_bytes: Count
    files: dict[str, FileFacts] = field(default_factory=dict)
    quantized_share: Share | None = None
    layers: tuple[dict[str, Any], ...] = ()
    estimate: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    schema_version: int = MANIFEST_SCHEMA

    def __post_init__(self) -> None:
        if self.variant not in known_variants():
            raise ValueError(f"unknown variant {self.variant!r}")
        if self.schema_version != MANIFEST_SCHEMA:
            raise ValueError(f"manifest schema {self.schema_version!r}, expected {MANIFEST_SCHEMA}")
        base_name(self.name)
        base_name(self.base_model)
        for name in self.files:
            parts = name.split("/")
            if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
                raise ValueError(f"{name!r} is no name of a file in this folder")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: Manifest

    @property
    def variant(self) -> Variant:
        return known_variants()[self.manifest.variant]

    @property
    def content_sha256(self) -> str:
        """One hash for the contents: over the sorted names and hashes of the files, the manifest left out."""
        return hash_of_hashes({name: facts.sha256 for name, facts in self.manifest.files.items()})


def base_name(name: str) -> str:
    """A base model's name, which also begins its checkpoints' folder names. Raises UserError for one that cannot."""
    if not re.fullmatch(r"\w[^/\\]{0,127}", name) or not name.isprintable():
        raise UserError(f"{name!r} cannot begin the names of folders: choose letters, digits, `.` and `-` with --name")
    return name


def is_model(folder: Path) -> bool:
    """Whether a model lies in this folder itself, and no checkpoint that `quantize` made."""
    return (folder / "config.json").is_file() and not (folder / MANIFEST_NAME).is_file()


def open_checkpoint(path: Path) -> Checkpoint:
    """The finished checkpoint in this folder. Raises UserError for none, a damaged one, and files not its own."""
    found = read_checkpoint(path)
    for name in _extra(found):
        raise UserError(f"{path / name} is no file of this checkpoint, {MANIFEST_NAME} says: move it away")
    return found


def read_checkpoint(path: Path) -> Checkpoint:
    """What the manifest in this folder says. Raises UserError when there is none or it is damaged."""
    manifest = path / MANIFEST_NAME
    if not path.is_dir():
        raise UserError(f"no such folder: {path}")
    if not manifest.is_file():
        raise UserError(f"{path} is no quantable checkpoint (no {MANIFEST_NAME}): make one with `quantize`")
    try:
        return Checkpoint(path, from_json(Manifest, manifest.read_bytes(), MANIFEST_NAME))
    except UserError as error:
        raise UserError(f"{manifest} is damaged ({error}): make the checkpoint again with `quantize --force`") from None


def is_for_people(name: str) -> bool:
    """Whether a file is of the card, not of the model."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in CARD_FILES)


def _extra(checkpoint: Checkpoint) -> list[str]:
    """Files that the manifest does not name, but for the card's and hidden ones, which nothing loads."""
    known = {MANIFEST_NAME, *checkpoint.manifest.files}
    there = (one.relative_to(checkpoint.path).as_posix() for one in checkpoint.path.rglob("*") if not one.is_dir())
    return sorted(one for one in there if one not in known and not one.startswith(".") and not is_for_people(one))


def checkpoint_folders(directory: Path) -> list[Path]:
    """The direct subfolders with a manifest, by name. Raises UserError when the folder does not exist."""
    if not directory.is_dir():
        raise UserError(f"no such folder: {directory}")
    folders = [path.parent for path in sorted(directory.glob(f"*/{MANIFEST_NAME}"))]
    return [path for path in folders if not path.name.startswith(".")]  # a killed run leaves those


def find_checkpoints(directory: Path) -> list[Checkpoint]:
    """Every finished checkpoint in the subfolders, by base model, in the table's order. Raises UserError for none."""
    found = [open_checkpoint(path) for path in checkpoint_folders(directory)]
    if not found:
        command = f"quantize SOURCE --out {directory}"
        raise UserError(f"{directory} holds no quantable checkpoint: make some with `{command}`")
    order = list(known_variants())
    return sorted(found, key=lambda c: (c.manifest.base_model, order.index(c.manifest.variant), c.manifest.name))


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest. Raises UserError naming the first that is missing, differs or is extra."""
    for name, problem in problems(checkpoint):
        raise UserError(f"{checkpoint.path / name} {problem}: make the checkpoint again with `quantize --force`")


def problems(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Each file that is not as the manifest says, and what is wrong with it; every one is read, but for the card's."""
    for name, facts in checkpoint.manifest.files.items():
        path = checkpoint.path / name
        if is_for_people(name):
            continue
        if not path.is_file():
            yield name, "is missing"
        elif path.stat().st_size != facts.bytes:
            yield name, f"has {path.stat().st_size} bytes instead of {facts.bytes}"
        elif sha256_of(path) != facts.sha256:
            yield name, "does not match its SHA-256"
    yield from ((name, f"is no file of this checkpoint, {MANIFEST_NAME} says") for name in _extra(checkpoint))


@contextlib.contextmanager
def writing(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `target`; when the block ends well, rename it to `target`.

    When the block raises (an interrupt included) the sibling is removed and `target` stays as it was. A full disk
    becomes a UserError. An existing `target` is replaced only with `force`, and only if it is a checkpoint of ours."""
    if target.exists():
        if not (target / MANIFEST_NAME).is_file():
            raise UserError(f"{target} exists and is no quantable checkpoint: choose another --out, or move it away")
        if not force:
            raise UserError(f"{target} exists: use --force to make it again")
    partial, old = _working_folders(target)
    clear(target)
    try:
        try:  # an empty folder but for a manifest that says nothing yet, which tells whose it is
            partial.mkdir(parents=True)
            (partial / MANIFEST_NAME).touch()
        except OSError as error:
            if disk_is_full(error):
                raise
            raise UserError(f"cannot write {partial} ({error.strerror}): choose another --out") from None
        yield partial
        try:  # the old one is kept until the new one stands
            if target.exists():
                target.rename(old)
            partial.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
        remove_working_folder(old, MANIFEST_NAME)
    except Exception as error:
        if disk_is_full(error):
            advice = "free some space or choose another --out; nothing half-written was kept"
            raise UserError(f"the disk is full while writing {target}: {advice}") from None
        raise
    finally:
        with contextlib.suppress(UserError):
            remove_working_folder(partial, MANIFEST_NAME)


def clear(target: Path) -> None:
    """Remove what killed runs left beside a checkpoint. Raises UserError for what is not of such a run."""
    for folder in _working_folders(target):
        remove_working_folder(folder, MANIFEST_NAME)


def _working_folders(target: Path) -> tuple[Path, Path]:
    """Where a checkpoint is made, and where the one that it replaces waits."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder`, put the hashes into the manifest and write it; return it as written."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    files = {path.relative_to(folder).as_posix(): FileFacts(path.stat().st_size, sha256_of(path)) for path in paths}
    sealed = replace(manifest, files=files)
    replace_file(folder / MANIFEST_NAME, (json.dumps(to_data(sealed), indent=1) + "\n").encode())
    return sealed
