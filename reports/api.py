"""`report` from Python: the command calls this and prints what it returns."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from bench.records import store
from bench.records.store import RECORDS_NAME
from bench.sweep.cell import SWEEP_NAME, Attempt, read_cells, standing
from quantize.checkpoint import MANIFEST_NAME
from quantize.errors import UserError
from quantize.files import write_whole
from quantize.process_memory import collector_paused
from quantize.units import parse_bytes
from reports.export import csv_text, json_text
from reports.html import html_page
from reports.markdown import markdown, screen
from reports.pages import page, published_page
from reports.plots import FORMATS as PICTURES
from reports.plots import file_bytes, plots, svg_element
from reports.published import BIOMISTRAL, has_published_rows, versus_page
from reports.results import Measurement, measurements
from reports.summary import summary
from reports.sweep import sweep_table
from reports.table import Block, Page, bulleted

Format = Literal["text", "md", "csv", "json", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[str, Format] = {**{one: one for one in FORMATS}, "txt": "text", "markdown": "md"}
TEXTS: dict[Format, Callable[[Page], str]] = {"text": screen, "md": markdown}
EXPORTS: dict[Format, Callable[[Sequence[Measurement]], str]] = {"csv": csv_text, "json": json_text}

View = Literal["summary", "full", "published", "versus"]
VIEWS: dict[View, Callable[[Sequence[Measurement]], Page]] = {
    "summary": summary,
    "full": page,
    "published": published_page,
}
"""What is shown of measurements: one screen, everything, the published table's columns."""


def report(
    source: Path | str,
    *,
    format: Format | None = None,
    out: Path | str | None = None,
    view: View = "summary",
    published: str = BIOMISTRAL,
) -> str:
    """The report on a folder that `bench` measured, or on one record file, as text; also written to `out`.

    format: "text", as on a terminal of 80 columns; "md", markdown; "csv", one flat row a checkpoint and scenario;
            "json", everything; "html", one file for a browser. None: what the ending of `out` says, else markdown.
    view:   of a text or markdown: one of VIEWS, or "versus", the table `published` beside ours.
    Raises UserError when there are no records, none of a reference, records that may not stand in one table, and where
    `out` is a record file."""
    return Reading(Path(source), view, published).write(format, out)


@dataclass(frozen=True)
class Reading:
    """A folder that `bench` measured, or one record file, read once. view, published: as `report` has."""

    source: Path
    view: View = "summary"
    published: str = BIOMISTRAL

    @cached_property
    def found(self) -> store.RecordFile:
        """The records of the file, or of the folder's records.jsonl. Raises UserError when there are none."""
        if self.models:
            parts = (Reading(self.source / how.name).found.records for how, measured in self.models if measured)
            return store.RecordFile(self.source, tuple(itertools.chain.from_iterable(parts)), ())
        if not self.source.exists():
            raise UserError(f"no such folder or file: {self.source}")
        found = store.read_file(self.source / RECORDS_NAME if self.source.is_dir() else self.source)
        if not found.records:
            raise UserError(f"{found.path} holds no records: run `bench` first")
        return found

    @cached_property
    def models(self) -> list[tuple[Attempt, list[Measurement]]]:
        """Of a sweep's folder: how each model stands, and what was measured of it; empty for any other folder."""
        models: list[tuple[Attempt, list[Measurement]]] = []
        for cell in read_cells(self.source) if (self.source / SWEEP_NAME).is_file() else ():
            how = standing(self.source, cell)
            try:
                models.append((how, Reading(self.source / cell.name).measurements))
            except UserError as error:
                models.append((replace(how, reason=str(error)) if how.state == "done" else how, []))
        return models

    @cached_property
    def absent(self) -> frozenset[str]:
        """Rows of checkpoints that are not in the folder any more, where some are; references that are needed stay."""
        folders = {path.parent.name for path in self.source.glob(f"*/{MANIFEST_NAME}")}
        subjects = {record.subject for record in self.found.records} if folders else set()
        here = {one.baseline for one in subjects if one.may_be_reference and one.folder in folders}
        gone = (one for one in subjects if one.folder not in folders)
        return frozenset(one.name for one in gone if not one.may_be_reference or one.baseline in here)

    @cached_property
    def measurements(self) -> list[Measurement]:
        """What was measured. Raises UserError for records that may not stand in one table."""
        if self.models:
            return [one for _, measured in self.models for one in measured]
        return measurements([one for one in self.found.records if one.subject.name not in self.absent])

    @property
    def sound(self) -> bool:
        """Whether every run ended well and no checkpoint is broken, as far as measurements were read."""
        read = self.__dict__.get("measurements", ())
        sound = not any(result.broken or result.failures for one in read for result in one.results)
        return sound and all(how.state != "failed" for how, _ in self.models)

    def page(self) -> tuple[Block, ...]:
        """The report, whole before any of it is shown."""
        if self.view == "versus":
            return tuple(versus_page(self.measurements, self.published))
        if self.view == "published":
            return tuple(published_page(self.measurements))
        if self.models:
            return (*sweep_table(self.models), *VIEWS[self.view](self.measurements))
        return (*VIEWS[self.view](self.measurements), *self._remarks())

    @collector_paused()
    def write(self, format: Format | None = None, out: Path | str | None = None) -> str:
        if out is not None:
            check_not_ours(Path(out))
        format = format or ENDINGS.get("md" if out is None else Path(out).suffix.removeprefix("."))
        if format is None:
            raise UserError(f"{out} says no format: end it in .{', .'.join(('txt', *FORMATS[1:]))}, or name --format")
        if format not in FORMATS:
            raise UserError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}")
        if self.view != "summary" and format not in TEXTS:
            raise UserError(f"{format} has everything already: leave --full, --table and --published out")
        if format == "html":
            text = self._html()
        else:
            text = TEXTS[format](self.page()) if format in TEXTS else EXPORTS[format](self.measurements)
        if out is not None:
            write_whole(Path(out), text.encode())
        return text

    def _html(self) -> str:
        """One file for a browser: the summary, the plots, every table, the records. Without matplotlib no plots."""
        drawn: list[str] = []
        notes = self._remarks()
        try:
            for number, measurement in enumerate(self.measurements):
                figures, _ = plots(measurement)
                drawn += [svg_element(figure, f"{name}-{number}") for name, figure in figures.items()]
        except UserError as error:
            notes += bulleted([f"No plots: {error}."])
        everything = (*page(self.measurements), *notes)
        return html_page(summary(self.measurements), everything, drawn, map(store.line_of, self.found.records))

    def _remarks(self) -> list[Block]:
        """What of the records is not shown, and why."""
        lines = [f"{self.found.damage}."] if self.found.damage else []
        lines += [f"{name} is not in {self.source} any more: its rows are left out." for name in sorted(self.absent)]
        return bulleted(lines)


def check_not_ours(path: Path) -> None:
    """Raises UserError for a file that holds records or is a checkpoint's: no report is written over it."""
    ours = path.suffix == ".jsonl" or (path.parent / MANIFEST_NAME).exists()
    if ours or (path.is_file() and path.stat().st_size and store.holds_records(path)):
        raise UserError(f"{path} would be written over with a report: give --out another name")


def write_all(folder: Path | str) -> tuple[list[Path], list[str], bool]:
    """Write every page and plot that a folder has records for beside them: table.md and, where a row is one of the
    published table's, published.md; the plots; NAME.md for every other record file NAME.jsonl.

    Returns the files, what could not be written, and whether every run ended well and no checkpoint is broken. Raises
    UserError for a folder without any record file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that `bench` measured")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no record files: run `bench` first")
    written, problems, reading = list[Path](), list[str](), Reading(folder, "full")

    def write_page(name: str, page: Callable[[], Page]) -> None:
        try:
            write_whole(folder / name, markdown(page()).encode())
            written.append(folder / name)
        except UserError as error:
            problems.append(f"no {name}: {error}")

    if folder / RECORDS_NAME in files:
        write_page("table.md", reading.page)
        if written and has_published_rows(reading.found.records):
            write_page("published.md", lambda: versus_page(reading.measurements))
        try:
            written += draw_plots(folder)[0]
        except UserError as error:
            problems.append(f"no plots: {error}")
    for file in files:
        if file.name != RECORDS_NAME and not file.name.startswith("records."):
            write_page(f"{file.stem}.md", Reading(file, "full").page)
    return written, problems, reading.sound


def draw_plots(source: Path, memory: str | None = None, context: int | None = None) -> tuple[list[Path], list[str]]:
    """Draw what this folder or file has records for as PNG and SVG beside it: the files, and what was left out and why.

    The same records give the same bytes. Of several measurements all but the first have their device and dtype in the
    files' names. memory: what there is ("6GB"), a line in the plots; context: tokens that the KV cache is reckoned for.
    Raises UserError where nothing can be drawn, without matplotlib, and where a file cannot be written."""
    folder = source if source.is_dir() else source.parent
    size = None if memory is None else parse_bytes(memory)
    content, left_out = dict[Path, bytes](), list[str]()
    for number, one in enumerate(Reading(source).measurements):
        apart = "-".join(["", one.device, *one.compute_dtypes]) if number else ""
        figures, reasons = plots(one, memory_bytes=size, context=context)
        files = {f"{name}{apart}.{form}": file_bytes(it, form) for name, it in figures.items() for form in PICTURES}
        content |= {folder / name: data for name, data in files.items()}
        left_out += reasons
    for path, data in content.items():
        write_whole(path, data)
    if not content:
        raise UserError("; ".join(left_out))
    return list(content), left_out
