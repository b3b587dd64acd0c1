"""`report` from Python: the command calls this and prints what it returns."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from bench.record import Record, read_records
from bench.run import RECORDS_NAME
from quantize.errors import UserError
from reports.export import csv_text, json_text
from reports.layout import page
from reports.markdown import markdown
from reports.results import Measurement, measurements
from reports.table import Page

Format = Literal["md", "csv", "json"]


def _markdown_text(found: Sequence[Measurement]) -> str:
    return markdown(page(found))


FORMATS: dict[Format, Callable[[Sequence[Measurement]], str]] = {
    "md": _markdown_text,
    "csv": csv_text,
    "json": json_text,
}


def report(source: Path | str, *, format: Format = "md", out: Path | str | None = None) -> str:
    """The report on a folder that `bench` measured, or on one record file, as text; also written to `out`.

    format: "md", the tables as markdown; "csv", one flat row a checkpoint and scenario; "json", everything.
    Raises UserError when there are no records, none of a reference, or records that may not stand in one
    table.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}")
    text = FORMATS[format](measurements(load_records(source)))
    if out is not None:
        write_whole(Path(out), text)
    return text


def report_page(source: Path | str) -> Page:
    """The report as blocks, for a terminal. Raises UserError as `report` does."""
    return page(measurements(load_records(source)))


def load_records(source: Path | str) -> list[Record]:
    """The records in this file, or in the folder's records.jsonl. Raises UserError when there are none."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"no such folder or file: {path}")
    if path.is_dir():
        path = path / RECORDS_NAME
    try:
        records = read_records(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is no record file: name the folder that `bench` measured") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if not records:
        raise UserError(f"{path} holds no records: run `bench` first")
    return records


def write_whole(path: Path, text: str) -> None:
    """Write all of `text` to `path` or leave what was there. Raises UserError when it cannot be written."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file in --out")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
