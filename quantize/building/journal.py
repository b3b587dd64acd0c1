"""What a quantization run leaves on disk as it goes, so that a killed one goes on at the layer it was in."""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.building.layer import LayerResult, LinearFacts
from quantize.building.shards import ShardWriter
from quantize.errors import UserError
from quantize.files import replace_file
from quantize.schema import from_json, to_data

JOURNAL_NAME = "journal.json"


@dataclass(frozen=True)
class State:
    """What journal.json says.

    key:     hash of what the run depends on.
    layers:  the facts of each finished layer's linears.
    seconds: a phase so far.
    """

    key: str
    layers: tuple[tuple[LinearFacts, ...], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


class Journal:
    """A working folder with the packed layers so far, the next layer's inputs, and the facts of each layer.

    `key` says what the run depends on (source, calibration, options, libraries): a folder left by a run with
    another key is emptied, and `restarted` says so. Files are written before the journal names them, and the
    journal is replaced in one step, so that a run may be killed at any moment.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        state = self._read()
        self.restarted = folder.exists() and (state is None or state.key != digest)
        if state is None or state.key != digest:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            state = State(digest)
        self._state = state

    @property
    def finished_layers(self) -> int:
        """How many decoder layers are done and on disk."""
        return len(self._state.layers)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """The LinearFacts of every layer done, as plain data, in order."""
        return [to_data(linear) for layer in self._state.layers for linear in layer]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds a phase so far, over all runs of this journal."""
        return dict(self._state.seconds)

    def writer(self, variant: str) -> ShardWriter:
        """Where the parts of one variant go."""
        folder = self.folder / variant
        folder.mkdir(exist_ok=True)
        return ShardWriter(folder)

    def hidden(self) -> list[Tensor] | None:
        """The next layer's inputs as last kept; None before the first layer is done."""
        if self.finished_layers == 0:
            return None
        tensors = load_file(self._hidden_path(self.finished_layers))
        return [tensors[name] for name in sorted(tensors)]

    def layer_done(self, result: LayerResult, hidden: list[Tensor]) -> None:
        """Keep the next layer's inputs and note that this layer's parts are on disk."""
        done = result.index + 1
        save_file(
            {f"{number:06d}": batch.contiguous().cpu() for number, batch in enumerate(hidden)}, self._hidden_path(done)
        )
        seconds = self.seconds
        for phase, spent in result.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        self._state = replace(self._state, layers=(*self._state.layers, result.facts), seconds=seconds)
        replace_file(self.folder / JOURNAL_NAME, json.dumps(to_data(self._state)).encode())
        self._hidden_path(result.index).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the working folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hidden_path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"

    def _read(self) -> State | None:
        path = self.folder / JOURNAL_NAME
        if not path.is_file():
            return None
        try:
            return from_json(State, path.read_bytes(), str(path))
        except UserError:
            return None


def discard_finished(folder: Path, finished: Collection[str]) -> None:
    """Remove a journal whose variants are all finished: its run was killed before it could."""
    variants = {path.name for path in folder.glob("*") if path.is_dir()} - {"activations"}
    if folder.is_dir() and variants <= set(finished):
        shutil.rmtree(folder, ignore_errors=True)


def options_key(
    *,
    source_sha256: str | None,
    config: Mapping[str, Any],
    calibration_sha256: str,
    options: Mapping[str, Any],
    libraries: Mapping[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result; options: by the name of the variant."""
    return {
        "source": source_sha256,
        "config": dict(config),
        "calibration": calibration_sha256,
        "options": dict(options),
        "libraries": dict(libraries),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
