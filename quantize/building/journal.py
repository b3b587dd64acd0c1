"""What a quantization run leaves on disk as it goes, so that a killed one goes on at the layer it was in."""

import contextlib
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.building.layer import Groups, LayerResult, LinearFacts
from quantize.errors import UserError
from quantize.files import remove_working_folder, replace_file, sha256_of
from quantize.schema import from_json, to_data

JOURNAL_NAME = "journal.json"


@dataclass(frozen=True)
class State:
    """What journal.json says.

    key:     hash of what the run depends on.
    layers:  the facts of each finished layer's linears.
    seconds: a phase so far, over all runs of this journal.
    files:   SHA-256 by name of all that the next run reads.
    groups:  where scales may move, for each kind of layer that was tried."""

    key: str
    layers: tuple[tuple[LinearFacts, ...], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Groups] = field(default_factory=dict)


class Journal:
    """A working folder with the packed layers so far, the next layer's inputs, and the facts of each layer.

    `key` says what the run depends on (source, calibration, options, libraries): a folder left by a run with
    another key, or one whose files are not those that it wrote, is emptied, and `restarted` says so. Files are written
    before the journal names them, and the journal is replaced in one step, so that a run may be killed at any moment.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = folder / JOURNAL_NAME
        with contextlib.suppress(OSError, UserError, ValueError):
            self.restarted, self.state = False, from_json(State, path.read_bytes(), str(path))
            if self.state.key == digest and self._is_whole():
                return
        self.restarted, self.state = folder.exists(), State(digest)
        remove_working_folder(folder, JOURNAL_NAME)
        folder.mkdir(parents=True)
        path.touch()  # the mark of a folder of ours
        self._write()

    def _is_whole(self) -> bool:
        same = all(sha256_of(self.folder / name) == sha256 for name, sha256 in self.state.files.items())
        return same and (not self.state.layers or self._hidden_path(self.finished_layers).name in self.state.files)

    @property
    def finished_layers(self) -> int:
        """How many decoder layers are done and on disk."""
        return len(self.state.layers)

    def parts(self, variant: str) -> Path:
        folder = self.folder / variant
        folder.mkdir(exist_ok=True)
        return folder

    def hidden(self) -> list[Tensor]:
        """The next layer's inputs as last kept; empty before the first layer is done."""
        if self.finished_layers == 0:
            return []
        tensors = load_file(self._hidden_path(self.finished_layers))
        return [tensors[name] for name in sorted(tensors)]

    def layer_done(
        self, result: LayerResult, hidden: list[Tensor], parts: Sequence[Path], groups: dict[str, Groups] | None = None
    ) -> None:
        """Keep the next layer's inputs and note that this layer's parts are on disk."""
        kept = {f"{number:06d}": batch.contiguous().cpu() for number, batch in enumerate(hidden)}
        path = self._hidden_path(result.index + 1)
        save_file(kept, path)
        written = {file.relative_to(self.folder).as_posix(): sha256_of(file) for file in (*parts, path)}
        files = self.state.files | written
        files.pop(self._hidden_path(result.index).name, None)
        before = self.state.seconds
        seconds = before | {phase: before.get(phase, 0.0) + spent for phase, spent in result.seconds.items()}
        self.state = State(self.state.key, (*self.state.layers, result.facts), seconds, files, dict(groups or {}))
        self._write()
        self._hidden_path(result.index).unlink(missing_ok=True)

    def discard(self) -> None:
        remove_working_folder(self.folder, JOURNAL_NAME)

    def _write(self) -> None:
        replace_file(self.folder / JOURNAL_NAME, json.dumps(to_data(self.state)).encode())

    def _hidden_path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"


def discard_finished(folder: Path, finished: Collection[str]) -> None:
    """Remove a journal whose variants are all finished: its run was killed before it could."""
    variants = {path.name for path in folder.glob("*") if path.is_dir()} - {"activations"}
    if variants <= set(finished) and (folder / JOURNAL_NAME).is_file():
        remove_working_folder(folder, JOURNAL_NAME)
