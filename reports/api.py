"""`report` from Python: the command calls this and prints what it returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from bench.records.crossover import CROSSOVER_NAME, CrossoverEntry
from bench.records.lab import OverheadRecord, ProfileRecord, RaceRecord, SideBySideRecord
from bench.records.record import Record
from bench.records.store import RECORDS_NAME, AnyRecord, read, read_crossover, read_records
from quantize.errors import UserError
from quantize.files import write_whole
from reports.crossover import crossover_page
from reports.export import csv_text, json_text
from reports.lab import overhead_page, profile_page, race_page, side_by_side_page
from reports.markdown import markdown
from reports.pages import page
from reports.plots import crossover_plots
from reports.published import has_published_rows, versus_page
from reports.results import Measurement, measurements
from reports.table import Page

Format = Literal["md", "csv", "json"]

EXPORTS: dict[Format, Callable[[Sequence[Measurement]], str]] = {"csv": csv_text, "json": json_text}
FORMATS: tuple[Format, ...] = ("md", *EXPORTS)

PAGES: dict[type[AnyRecord], Callable[[Sequence[Any]], Page]] = {
    Record: lambda records: page(measurements(records)),
    CrossoverEntry: crossover_page,
    RaceRecord: race_page,
    OverheadRecord: overhead_page,
    SideBySideRecord: side_by_side_page,
    ProfileRecord: profile_page,
}
"""What is shown of each kind of record."""


def report(source: Path | str, *, format: Format = "md", out: Path | str | None = None, published: bool = False) -> str:
    """The report on a folder that `bench` measured, or on one record file of any kind, as text; also written to `out`.

    format: "md", the tables as markdown; "csv", one flat row a checkpoint and scenario; "json", everything.
    published: the published table beside ours instead, as markdown alone.
    Raises UserError when there are no records, none of a reference, records that may not stand in one table, and where
    `out` is a record file.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}")
    if published and format != "md":
        raise UserError("the published table beside ours is markdown: leave --format out")
    same = out is not None and Path(source).is_file() and Path(out).resolve() == Path(source).resolve()
    if out is not None and (same or Path(out).suffix == ".jsonl"):
        raise UserError(f"{out} would be written over with a report: give --out another name")
    if format == "md":
        text = markdown(report_page(source, published=published))
    else:
        text = EXPORTS[format](measurements(load_records(source)))
    if out is not None:
        write_whole(Path(out), text.encode())
    return text


def report_page(source: Path | str, *, published: bool = False) -> Page:
    """The report as blocks, for a terminal; the crossover's at its end. Raises UserError as `report` does."""
    path = Path(source)
    if published:
        return versus_page(measurements(load_records(path)))
    if path.is_file():
        return page_of(path)
    crossover = _crossover_file(path)
    blocks = crossover_page(read_crossover(crossover)) if crossover else ()
    if crossover and not (path / RECORDS_NAME).exists():
        return blocks
    return (*page(measurements(load_records(path))), *blocks)


def page_of(path: Path) -> Page:
    """The page of one record file, of whatever kind. Raises UserError for an empty one, and one of several kinds."""
    if path.name == CROSSOVER_NAME:
        return crossover_page(read_crossover(path))
    records = read(path)
    if not records:
        raise UserError(f"{path} holds no records: run `bench` first")
    kinds = {type(record) for record in records}
    if len(kinds) > 1:
        raise UserError(f"{path} holds records of {len(kinds)} kinds: keep each in a file of its own")
    return PAGES[kinds.pop()](records)


def write_all(folder: Path | str) -> tuple[list[Path], list[str]]:
    """Write every page and plot that a folder has records for beside them; the files, and what could not be written.

    table.md and, where a row is one of the published table's, published.md; the crossover's plots; NAME.md for every
    other record file NAME.jsonl. Raises UserError for a folder without any record file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that `bench` measured")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no record files: run `bench` first")
    written: list[Path] = []
    problems: list[str] = []

    @contextmanager
    def attempt(name: str) -> Iterator[Path]:
        try:
            yield folder / name
        except UserError as error:
            problems.append(f"no {name}: {error}")

    def write_page(path: Path, page: Page) -> None:
        write_whole(path, markdown(page).encode())
        written.append(path)

    if folder / RECORDS_NAME in files:
        with attempt("table.md") as table:
            write_page(table, report_page(folder))
        if written and has_published_rows(load_records(folder)):
            with attempt("published.md") as published:
                write_page(published, report_page(folder, published=True))
    if folder / CROSSOVER_NAME in files:
        with attempt("crossover.png"):
            written += draw_plots(folder)
    for file in files:
        if file.name != RECORDS_NAME and not file.name.startswith("records."):
            with attempt(f"{file.stem}.md") as path:
                write_page(path, page_of(file))
    return written, problems


def draw_plots(source: Path | str) -> list[Path]:
    """Draw the crossover of this folder or file as PNG and SVG beside it. Raises UserError where there is none."""
    record = _crossover_file(Path(source))
    if record is None:
        raise UserError(f"no {CROSSOVER_NAME} in {source}: run `python -m bench.crossover --out {source}` first")
    return crossover_plots(read_crossover(record), record.parent)


def _crossover_file(source: Path) -> Path | None:
    """The crossover's record that belongs to a folder or is this file; None without one."""
    path = source / CROSSOVER_NAME if source.is_dir() else source
    return path if path.name == CROSSOVER_NAME and path.is_file() else None


def load_records(source: Path | str) -> list[Record]:
    """The records in this file, or in the folder's records.jsonl. Raises UserError when there are none."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"no such folder or file: {path}")
    if path.is_dir():
        path = path / RECORDS_NAME
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no records: run `bench` first")
    return records
