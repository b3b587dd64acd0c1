"""What a run leaves behind: one JSON line each, immutable, versioned. Imports no torch.

A Record is written once, when its run ends, whether it went well or not; everything shown later (ratios,
tables, plots) is computed from records and nothing else.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bench.scenario import Scenario
from quantize.errors import UserError

SCHEMA_VERSION = 1
BEGINNING = '{"kind":'
"""How the line of every record begins."""

Kind = Literal["latency", "quality"]
Status = Literal["ok", "oom", "timeout", "unsupported", "error"]


@dataclass(frozen=True)
class Subject:
    """The checkpoint that was measured, as its row in the table names it.

    `content_sha256` is the hash over the manifest's file hashes: the same name with other contents is another
    subject. `weights_bytes` counts every tensor in the checkpoint's safetensors files.
    """

    name: str
    base_model: str
    variant: str
    method: str
    q_group_size: int | None
    w_bit: int | None
    version: str | None
    download: str | None
    content_sha256: str
    file_weights_bytes: int
    rounding: str | None = None


@dataclass(frozen=True)
class Kernels:
    """The kernel that really ran the quantized linear layers in each phase, e.g. "torch int4 (cpu)"."""

    prefill: str
    decode: str


@dataclass(frozen=True)
class Latency:
    """Raw samples, in the order taken; nothing is dropped.

    prefill_s: seconds of each repetition's prompt pass, the first new token included.
    decode_s:  for each repetition, the seconds of each decode step (a list of `decode_steps` entries).
    warmup_s:  seconds of each warm-up repetition at the measured shape, not counted in the figures.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]
    warmup_s: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes; what could not be told is None, never 0.

    weights_bytes:    parameters and buffers of the loaded model, each storage once.
    source:           what the peaks mean: "RSS" (resident set size of the process) or "CUDA allocator".
    baseline_bytes:   after load, before the first run.
    load_peak_bytes:  highest while loading.
    run_peak_bytes:   highest while running the scenario.
    nvml_process_bytes, nvml_device_bytes: NVML's view of this process and of the whole device after the run.
    """

    weights_bytes: int
    source: str
    baseline_bytes: int | None
    load_peak_bytes: int | None
    run_peak_bytes: int | None
    nvml_process_bytes: int | None = None
    nvml_device_bytes: int | None = None


@dataclass(frozen=True)
class Quality:
    """Perplexity = exp(mean negative log-likelihood per predicted token) on held-out text."""

    perplexity: float
    tokens: int
    text: str
    text_sha256: str


@dataclass(frozen=True)
class Record:
    """One run of one checkpoint: a latency run (one scenario, one round) or a quality run.

    `status` is "ok" exactly when the figures of its kind are there; otherwise `reason` says in one line why
    not. `environment` is the fingerprint of the machine and the libraries; `position` counts the runs of one
    plan; `device_state` holds NVML's looks at the GPU "before" and "after" the run
    (bench.device.DeviceState).
    """

    kind: Kind
    status: Status
    subject: Subject
    device: str
    started_at: str
    environment: dict[str, Any]
    wall_s: float
    reason: str | None = None
    scenario: Scenario | None = None
    round: int | None = None
    position: int | None = None
    compute_dtype: str | None = None
    kernels: Kernels | None = None
    latency: Latency | None = None
    memory: Memory | None = None
    quality: Quality | None = None
    device_state: dict[str, Any] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.status not in get_args(Status):
            raise ValueError(f"record of kind {self.kind!r}, status {self.status!r}")
        if (self.status == "ok") == (self.reason is not None):
            raise ValueError("a record has a reason exactly when its status is not ok")
        figures = self.latency if self.kind == "latency" else self.quality
        if self.status == "ok" and figures is None:
            raise ValueError(f"an ok {self.kind} record has {self.kind} figures")
        if self.kind == "latency" and self.scenario is None:
            raise ValueError("a latency record has a scenario")

    def to_json_line(self) -> str:
        """The record as one line of JSON, without the line's end."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Record":
        """The record that `to_json_line` wrote. Raises UserError for an unknown schema version."""
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"record of schema version {version!r}, this quantable reads version {SCHEMA_VERSION}: "
                "use the quantable that wrote it, or measure again"
            )
        nested: dict[str, Any] = {
            "subject": Subject,
            "scenario": Scenario,
            "kernels": Kernels,
            "memory": Memory,
            "quality": Quality,
        }
        fields = dict(data)
        for name, cls in nested.items():
            if fields.get(name) is not None:
                fields[name] = cls(**fields[name])
        if fields.get("latency") is not None:
            raw = fields["latency"]
            fields["latency"] = Latency(
                tuple(raw["prefill_s"]),
                tuple(tuple(steps) for steps in raw["decode_s"]),
                tuple(raw["warmup_s"]),
            )
        return Record(**fields)


def append_record(path: Path, record: Record) -> None:
    """Append one line to `path` and force it to disk, so that a crash later loses nothing written before.

    A torn last line, left by a crash in the middle of a write, is ended first: it must not swallow this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(record.to_json_line().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[Record]:
    """Every record in a JSON-lines file, in the order written; a torn line that a crash left is passed over.

    Raises UserError when the file is missing, holds something that is no record, or has an unknown schema.
    """
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise UserError(f"no record file {path}: run `bench` first")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            if line.startswith(BEGINNING) or BEGINNING.startswith(line):  # a crash cut off the rest
                continue
            raise UserError(f"{path}, line {number} is no record: not a file that `bench` wrote?") from None
        try:
            yield Record.from_json(data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is no record ({error})") from None


def latency_records(records: Iterable[Record]) -> list[Record]:
    """Only the latency runs that ended well."""
    return [record for record in records if record.kind == "latency" and record.status == "ok"]
