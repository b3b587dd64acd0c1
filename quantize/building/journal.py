"""What a quantization run leaves on disk as it goes, so that a killed one goes on at the layer it was in."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.building.layer import LayerResult
from quantize.building.shards import ShardWriter

JOURNAL_NAME = "journal.json"


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
        self.restarted = folder.exists() and (state is None or state["key"] != digest)
        if state is None or state["key"] != digest:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            state = {"key": digest, "layers": [], "seconds": {}}
        self._state: dict[str, Any] = state

    @property
    def finished_layers(self) -> int:
        """How many decoder layers are done and on disk."""
        return len(self._state["layers"])

    @property
    def facts(self) -> list[dict[str, Any]]:
        """The LinearFacts of every layer done, as plain data, in order."""
        return [linear for layer in self._state["layers"] for linear in layer]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds a phase so far, over all runs of this journal."""
        return dict(self._state["seconds"])

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
            {f"{number:06d}": batch.contiguous().cpu() for number, batch in enumerate(hidden)},
            self._hidden_path(done),
        )
        self._state["layers"].append([asdict(facts) for facts in result.facts])
        for phase, spent in result.seconds.items():
            self._state["seconds"][phase] = self._state["seconds"].get(phase, 0.0) + spent
        temporary = self.folder / f"{JOURNAL_NAME}.tmp"
        temporary.write_text(json.dumps(self._state))
        temporary.rename(self.folder / JOURNAL_NAME)
        self._hidden_path(result.index).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the working folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hidden_path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / JOURNAL_NAME
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text())
        except ValueError:
            return None
        return state if {"key", "layers", "seconds"} <= state.keys() else None


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
