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

from bench.records.scenario import Scenario
from quantize.errors import UserError
from quantize.variant import REFERENCE

SCHEMA_VERSION = 3
BEGINNING = '{"kind":'
"""How the line of every record begins."""

Kind = Literal["latency", "quality", "tasks"]
Status = Literal["ok", "oom", "timeout", "unsupported", "error"]
Stopped = Literal["noise", "time", "passes"]


@dataclass(frozen=True)
class Subject:
    """What was measured, as its row in the table names it.

    content_sha256: over the manifest's file hashes; the same name with other contents is another subject.
    file_weights_bytes: every tensor in the checkpoint's safetensors files, None where there are none. family: the base
    model that its reference is of, None for its own. kernel: what the user chose for the quantized layers ("native" or
    a kernel's name), None for what is fastest. dummy: the shape of weights that were random and never on disk.
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
    file_weights_bytes: int | None
    rounding: str | None = None
    family: str | None = None
    kernel: str | None = None
    dummy: str | None = None


def family_of(subject: Subject) -> str:
    """The base model whose reference this subject is compared with: rows of one family share one reference."""
    return subject.family or subject.base_model


def may_be_reference(subject: Subject) -> bool:
    """Whether its family can be compared with it: half precision, of the base model that the family is named after."""
    return subject.variant == REFERENCE.name and subject.base_model == family_of(subject)


@dataclass(frozen=True)
class Kernels:
    """The kernel that really ran the quantized linear layers in each phase, e.g. "torch int4 (cpu)"."""

    prefill: str
    decode: str


@dataclass(frozen=True)
class Latency:
    """Raw samples, in the order taken; nothing is dropped.

    prefill_s: seconds of each repetition's prompt pass, the first new token included; over several prompts their sum.
    decode_s:  for each repetition, the seconds of each decode step: `decode_steps` of them for each of its prompts.
    warmup_s:  seconds of each warm-up repetition at the measured shape, not counted in the figures.
    steady:    whether the warm-up became steady before its passes ran out (bench.records.steady); None in old
               records, and where its time was over before.
    stopped:   why no more repetitions were timed, "noise" (low enough), "time" or "passes"; None in old records.
    prefill_by_length_s: for each repetition, the seconds of each of the scenario's `lengths`; empty where it has none.
    decode_mode: how the decode steps really ran, "eager", "CUDA graph" or "static cache" (the same without a graph);
    None where there are none, and in old records, which were all eager.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]
    warmup_s: tuple[float, ...]
    steady: bool | None = None
    stopped: Stopped | None = None
    prefill_by_length_s: tuple[tuple[float, ...], ...] = ()
    decode_mode: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes; what could not be told is None, never 0.

    weights_bytes:    parameters and buffers of the loaded model, each storage once.
    source:           what the peaks mean: "RSS" (resident set size of the process) or "CUDA allocator".
    baseline_bytes:   after load, before the first run.
    load_peak_bytes:  highest while loading.
    run_peak_bytes:   highest while running the scenario.
    nvml_process_bytes, nvml_device_bytes: NVML's view of this process and of the whole device after the run.
    kv_cache_bytes:   keys and values held when the scenario's last token was made; a static cache holds all its slots.
    kv_cache_formula_bytes: 2 * layers * key-value heads * head size * tokens * batch * bytes of a value.
    reserved_peak_bytes: the most that CUDA's allocator had taken from the device, cached blocks included.
    decode_bytes:     what a decode step must read at least: every weight and buffer once but for the input embedding,
    of which it takes one row, unless the output head is tied to it; keys and values are not in it.
    """

    weights_bytes: int
    source: str
    baseline_bytes: int | None
    load_peak_bytes: int | None
    run_peak_bytes: int | None
    nvml_process_bytes: int | None = None
    nvml_device_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_formula_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    decode_bytes: int | None = None

    @property
    def activations_bytes(self) -> int | None:
        """What the run held at its peak beside the model and the cache: activations, logits, work space."""
        if self.run_peak_bytes is None or self.baseline_bytes is None or self.kv_cache_bytes is None:
            return None
        return max(0, self.run_peak_bytes - self.baseline_bytes - self.kv_cache_bytes)

    @property
    def rest_bytes(self) -> int | None:
        """What was held after loading beside the weights: the interpreter, the libraries, the allocator's slack."""
        return None if self.baseline_bytes is None else max(0, self.baseline_bytes - self.weights_bytes)


@dataclass(frozen=True)
class Divergence:
    """How far the next-token distributions are from the reference's, in nats: KL(reference || model).

    mean, median, p99: over the predicted tokens; flips: the share of tokens whose likeliest choice is another one.
    """

    mean: float
    median: float
    p99: float
    flips: float


@dataclass(frozen=True)
class Quality:
    """Perplexity = exp(mean negative log-likelihood per predicted token) on held-out text.

    divergence: from the reference, None for the reference itself and where it left nothing to compare with.
    noise_floor: of the reference alone: its divergence from itself when the same sums are done in another order.
    """

    perplexity: float
    tokens: int
    text: str
    text_sha256: str
    divergence: Divergence | None = None
    noise_floor: Divergence | None = None


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval says of one task: its main metric over `samples` questions with `shots` examples before each."""

    name: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Record:
    """One run of one checkpoint: a latency run (one scenario, one round), a quality run, or tasks.

    `status` is "ok" exactly when the figures of its kind are there; otherwise `reason` says in one line why
    not. `environment` is the fingerprint of the machine and the libraries; `position` counts the runs of one
    plan; `device_state` holds NVML's looks at the GPU "before" and "after" the run (bench.worker.gpu.DeviceState) and
    what was seen "between" its passes (bench.worker.gpu.Seen). prompt_sha256: of the prompt's token ids. quantization:
    what the loaded model says of its own quantization (bitsandbytes' threshold and type among it). plan: the rules of
    the bench (bench.records.stopping.Rounds) and of one measurement (Rule) that it was taken under. placement: how a
    model too big for one GPU was spread, None for one on one device.
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
    prompt_sha256: str | None = None
    plan: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    tasks: tuple[TaskScore, ...] | None = None
    placement: str | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.status not in get_args(Status):
            raise ValueError(f"record of kind {self.kind!r}, status {self.status!r}")
        if (self.status == "ok") == (self.reason is not None):
            raise ValueError("a record has a reason exactly when its status is not ok")
        figures = {"latency": self.latency, "quality": self.quality, "tasks": self.tasks}[self.kind]
        if self.status == "ok" and figures is None:
            raise ValueError(f"an ok {self.kind} record has {self.kind} figures")
        if self.kind == "latency" and self.scenario is None:
            raise ValueError("a latency record has a scenario")

    def to_json_line(self) -> str:
        """The record as one line of JSON, without the line's end."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Record":
        """The record that `to_json_line` wrote, brought up to date. Raises UserError for an unknown schema version."""
        fields = migrated(data)
        nested: dict[str, Any] = {
            "subject": Subject,
            "kernels": Kernels,
            "memory": Memory,
        }
        for name, cls in nested.items():
            if fields.get(name) is not None:
                fields[name] = cls(**fields[name])
        if fields.get("scenario") is not None:
            fields["scenario"] = Scenario.from_json(fields["scenario"])
        if fields.get("latency") is not None:
            fields["latency"] = _latency(fields["latency"])
        if fields.get("quality") is not None:
            raw = dict(fields["quality"])
            for name in ("divergence", "noise_floor"):
                raw[name] = Divergence(**raw[name]) if raw.get(name) else None
            fields["quality"] = Quality(**raw)
        if fields.get("tasks") is not None:
            fields["tasks"] = tuple(TaskScore(**score) for score in fields["tasks"])
        return Record(**fields)


def _latency(data: dict[str, Any]) -> Latency:
    series = {name: tuple(data[name]) for name in ("prefill_s", "warmup_s")}
    nested = {"decode_s": data["decode_s"], "prefill_by_length_s": data.get("prefill_by_length_s", ())}
    return Latency(**{**data, **series, **{name: tuple(map(tuple, values)) for name, values in nested.items()}})


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Version 2 added fields alone, which are unknown in older records."""
    return {**data, "schema_version": 2}


def _from_version_2(data: dict[str, Any]) -> dict[str, Any]:
    """So did version 3: a subject's family and kernel, prompt lengths, decode modes, the bytes a step reads."""
    return {**data, "schema_version": 3}


MIGRATIONS = {1: _from_version_1, 2: _from_version_2}
"""By the version they start from; each leads to the next."""


def migrated(data: dict[str, Any]) -> dict[str, Any]:
    """A record's JSON in today's schema. Raises UserError for a version that nothing here leads from."""
    version = data.get("schema_version")
    while isinstance(version, int) and version in MIGRATIONS:
        data = MIGRATIONS[version](data)
        version = data["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"record of schema version {version!r}, this quantable reads versions up to {SCHEMA_VERSION}: "
            "use the quantable that wrote it, or measure again"
        )
    return dict(data)


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
