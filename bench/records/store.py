"""Record files: one JSON line a record; appended under a lock, checked when read. Imports no torch."""

import codecs
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import msgspec

from bench.records.record import Record
from quantize.errors import UserError
from quantize.files import write_whole
from quantize.process_memory import collector_paused
from quantize.schema import from_data, from_json, parse_json, strict

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORDS_NAME = "records.jsonl"
KINDS: tuple[str, ...] = get_args(get_type_hints(Record)["kind"])
LABORATORY = ("blocks_sha256", "decode_s_a_token", "iterations", "architecture", "operations", "style")
"""Fields that tell a record of tests/lab, whatever its version."""


def append(path: Path, *records: "DataclassInstance") -> None:
    """Append a line a record and force them to disk, so that a crash later loses nothing written before.

    A torn last line, left by a crash in the middle of a write, is ended first: it must not swallow the next. A lock
    file beside `path` keeps two writers apart. Raises UserError where `path` cannot be written."""
    from filelock import FileLock  # slow, and no --help needs it

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")), path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(b"".join(line_of(record).encode() + b"\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another place") from None


def write(path: Path, records: "Iterable[DataclassInstance]") -> None:
    """Write these records alone; a crash leaves the older ones. Raises UserError where `path` cannot be written."""
    with contextlib.suppress(OSError):  # what cannot be made cannot be written to either
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line_of(record)}\n" for record in records).encode())


def line_of(record: "DataclassInstance") -> str:
    """The record as one line of JSON, without the line's end."""
    return json.dumps(asdict(record), separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class RecordFile:
    """What a record file holds, in the order written; torn: the numbers of lines that a crash cut off."""

    path: Path
    records: tuple[Record, ...]
    torn: tuple[int, ...]

    @property
    def damage(self) -> str | None:
        """What of it is lost, in words."""
        where = f"line{'s' * (len(self.torn) > 1)} {', '.join(map(str, self.torn))}"
        return f"{self.path.name} is torn in {where}: a run that was being written there is lost" if self.torn else None


def read_file(path: Path) -> RecordFile:
    """Read a record file; a repeated line counts once. Raises UserError, naming the line, for what is no record."""
    if not path.is_file():
        raise UserError(f"no record file {path}: run `bench` first")
    found, torn, seen, reader = list[Record](), [], set[bytes](), _Reader()
    try:
        with path.open("rb") as file, collector_paused():
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
                digest = hashlib.blake2b(content, digest_size=16).digest()
                if not content or digest in seen:  # the same run, of two files made one
                    continue
                seen.add(digest)
                record = reader.measurement(content) or _record_of(content.decode(), f"{path}, line {number}")
                if record is None:
                    torn.append(number)
                else:
                    found.append(record)
    except UnicodeDecodeError:
        raise UserError(f"{path} is no record file: name the folder that `bench` measured") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    return RecordFile(path, tuple(found), tuple(torn))


def _record_of(line: str, where: str) -> Record | None:
    """What `record_from` makes of a line, None for one that a crash cut off. Raises UserError for what is no record."""
    try:
        data = parse_json(line, where)
    except UserError:
        if _is_torn(line):
            return None
        raise UserError(f"{where} is no record: not a file that `bench` wrote?") from None
    return record_from(data, where)


class _Reader:
    """Makes measurements of lines in one step each; what lines have in common is made once and held once."""

    COMMON = ("subject", "environment", "scenario", "plan", "kernels", "memory", "quantization")

    def __init__(self) -> None:
        self._kinds = get_type_hints(Record, include_extras=True)
        self._known: dict[str, dict[bytes, object]] = {name: {} for name in self.COMMON}
        version = Annotated[int, msgspec.Meta(ge=1, le=Record.schema_version)]
        fields: list[Any] = [("schema_version", version), *((name, msgspec.Raw, None) for name in self.COMMON)]
        how: dict[str, Any] = {"bases": (strict(Record),), "kw_only": True, "forbid_unknown_fields": True}
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Line", fields, **how))

    def measurement(self, line: bytes) -> Record | None:
        """The Record in this line; None for any other line, of which `record_from` says what it is."""
        try:
            fields = msgspec.structs.asdict(self._decoder.decode(line))
            for name, known in self._known.items():
                if (raw := fields[name]) is not None:
                    content = bytes(raw)
                    if content not in known:
                        known[content] = from_json(self._kinds[name], content, name)
                    fields[name] = known[content]
            fields["schema_version"] = Record.schema_version
            return msgspec.convert(fields, Record, from_attributes=True)
        except (msgspec.DecodeError, UserError, ValueError, RecursionError):
            return None


def holds_records(path: Path) -> bool:
    """Whether a line of this file is a record of ours, of any version; an empty file holds nothing else."""
    content = path.read_bytes() if path.is_file() else b"no file"
    marks = ('"kind":', *(f'"{name}":' for name in LABORATORY))
    lines = [line for line in content.decode("utf-8-sig", "replace").split("\n") if line.strip()] or [""]
    ours = ('"schema_version":' in one and any(mark in one for mark in marks) for one in lines)
    return lines == [""] or (lines[0] != "<!doctype html>" and any(ours))


def read_records(path: Path) -> list[Record]:
    """The measurements in a file. Raises UserError as `read_file` does."""
    return list(read_file(path).records)


def record_from(data: object, where: str) -> Record:
    """A record, from what its JSON line holds, brought up to date. Raises UserError for what is none."""
    held: dict[str, Any] = data if isinstance(data, dict) else {}
    if any(name in held for name in LABORATORY):
        raise UserError(f"{where}: these are records of the laboratory, `python -m tests.lab.pages FILE` prints them")
    if (kind := held.get("kind")) not in KINDS:
        raise UserError(f"{where} is no record (kind {kind!r}): not a file that `bench` wrote?")
    version, newest = held.get("schema_version"), Record.schema_version
    if type(version) is not int or not 1 <= version <= newest:
        said = f"{where}: record of schema version {version!r}, this quantable reads versions up to {newest}"
        raise UserError(f"{said}: use the quantable that wrote it, or measure again")
    # A later schema has more fields, unknown in older records.
    return from_data(Record, {**held, "schema_version": newest}, where)


def _is_torn(line: str) -> bool:
    """Whether this is the beginning of a line of ours, which a crash cut off; a whole line that is no JSON is not."""
    beginnings = ('{"kind":', '{"schema_version":', '{"when":')
    if not any(line.startswith(one) or one.startswith(line) for one in beginnings):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return not line.endswith("}") or error.pos >= len(line) or error.msg.startswith("Unterminated")
    except RecursionError:
        pass
    return False
