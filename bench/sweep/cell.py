"""A sweep's files: its cells, what each attempt at one came to, and how each stands. Imports no torch."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bench.records.store import RECORDS_NAME
from quantize.checkpoint import MANIFEST_NAME, base_name, find_checkpoints
from quantize.errors import UserError
from quantize.files import hash_of_hashes, replace_file, sha256_of
from quantize.schema import from_json, to_data
from quantize.suite import MERGE_PREFIX, SUITES, QuantizeCall, calls_of, rows_of, suite_file, suite_rows
from quantize.variant import REFERENCE, variants_named

SWEEP_NAME, AT_WORK = "sweep.json", ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")  # in Slurm's words
Options = tuple[tuple[str, ...], tuple[str, ...]]  # of `quantize` and of `bench`, in words


@dataclass(frozen=True)
class Cell:
    """One base model with its variants and its reference, on one device.

    name:     the base model's, and its folder's in the sweep's; calls: what to make.
    suite:    whose rows and scenarios are measured, None for what `bench` says; options: of these commands.
    contents: hashes of what can change under a name: local weights, a recipe, a suite's file."""

    name: str
    calls: tuple[QuantizeCall, ...]
    suite: str | None
    options: Options
    contents: tuple[str, ...]

    @property
    def key(self) -> str:
        """Equal for two cells that ask for the same of the same."""
        return hashlib.sha256(json.dumps(to_data(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Attempt:
    """What one process made of a cell, in a file of its own, as two copies of one job may live; or how a cell stands.

    name, key: of the cell; state: as it ended, else running, or waiting for Slurm; job: of Slurm, its number.
    reason:    why it failed, or what is amiss; contents: the hash of each checkpoint that was measured.
    started, seconds: of the epoch, and that it took; host, process: where it ran."""

    name: str
    key: str
    state: Literal["done", "running", "waiting", "failed"]
    reason: str = ""
    job: str | None = None
    seconds: float = 0.0
    contents: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)

    def write(self, out: Path) -> None:
        folder = out / self.name / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(to_data(self), indent=1)
        replace_file(folder / f"{self.started:.6f}-{self.host}-{self.process}.json", content.encode())

    def line(self) -> str:
        took = f" in {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.name}: {self.state}{took}{': ' if self.reason else ''}{self.reason}"


def cells_from(names: Sequence[str], variants: Sequence[str], merge: bool, options: Options) -> tuple[Cell, ...]:
    """The cells of these suites and models. Raises UserError for two that would share a folder."""
    cells: dict[str, Cell] = {}
    for name in names:
        chosen = tuple(dict.fromkeys((REFERENCE.name, *(one.name for one in variants_named(variants)))))
        place = Path(name).resolve() if Path(name).is_dir() else Path(name.removesuffix(".yaml").rpartition(":")[2])
        calls, suite, contents = {place.name: [QuantizeCall(None, name, None, None, chosen)]}, None, list[str]()
        if name.endswith(".toml") or (SUITES / f"{name}.toml").is_file():
            rows, suite, contents = suite_rows(name, merge=merge), name, [sha256_of(suite_file(name))]
            calls = {row.base_model: calls_of(rows_of(rows, row.base_model)) for row in rows}
        for base, own in calls.items():
            if base in cells:
                raise UserError(f"two models of the sweep are called {base}: sweep them into two folders")
            known = (*contents, *(_content(call.source) for call in own))
            cells[base] = Cell(base_name(base), tuple(own), suite, options, known)
    return tuple(cells.values())


def _content(source: str) -> str:
    """What tells a source from another of its name: local weights or a recipe, hashed; nothing for what the hub has."""
    recipe = Path(source.removeprefix(MERGE_PREFIX))
    files = [recipe] if recipe.is_file() else sorted(Path(source).glob("*.safetensors"))
    return hash_of_hashes({file.name: sha256_of(file) for file in files})


def read_cells(out: Path) -> tuple[Cell, ...]:
    """Raises UserError where no sweep was begun."""
    path = out / SWEEP_NAME
    if not path.is_file():
        raise UserError(f"{out} holds no sweep: begin one with `quantable sweep MODELS --out {out}`")
    return from_json(tuple[Cell, ...], path.read_bytes(), str(path))


def contents_of(place: Path) -> dict[str, str]:
    """The checkpoints in a cell's folder and their hashes; of random weights there are none."""
    made = find_checkpoints(place) if any(place.glob(f"*/{MANIFEST_NAME}")) else []
    return {one.path.name: one.content_sha256 for one in made}


def standing(out: Path, cell: Cell, queued: Mapping[str, str] | None = None) -> Attempt:
    """How a cell stands: done where an attempt at the same ended well and its checkpoints and records are there still.

    queued: the state of every Slurm job that waits or runs; None where Slurm is not asked."""
    place, files = out / cell.name, sorted((out / cell.name / "attempts").glob("*.json"))
    found = [one for file in files if (one := from_json(Attempt, file.read_bytes(), str(file))).key == cell.key]
    if done := [one for one in found if one.state == "done"]:
        if (place / RECORDS_NAME).is_file() and contents_of(place) == done[-1].contents:
            return done[-1]
        return Attempt(cell.name, cell.key, "waiting", "its checkpoints or records are not what was measured")
    if not found:
        return Attempt(cell.name, cell.key, "waiting")
    last = found[-1]
    if last.state == "failed" or (last.job and queued is None):
        return last
    if last.job and queued and (said := queued.get(last.job)):
        return replace(last, state="running" if said in AT_WORK else "waiting", reason=f"Slurm says {said.lower()}")
    if last.job or (last.host == socket.gethostname() and not Path(f"/proc/{last.process}").exists()):
        gone = f"Slurm job {last.job}" if last.job else f"process {last.process} on {last.host}"
        return replace(last, state="failed", reason=f"{gone} is gone without a word; the same sweep again goes on")
    return last
