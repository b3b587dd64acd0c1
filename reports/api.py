"""`report` from Python: the command calls this and prints what it returns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from bench.records.crossover import CROSSOVER_NAME, read_crossover
from bench.records.record import Record, read_records
from bench.run.run import RECORDS_NAME
from quantize.errors import UserError
from quantize.files import write_whole
from reports.crossover import crossover_file, crossover_page
from reports.export import csv_text, json_text
from reports.markdown import markdown
from reports.pages import page
from reports.plots import crossover_plots
from reports.results import Measurement, measurements
from reports.table import Page
from reports.versus_published import versus_page

Format = Literal["md", "csv", "json"]


EXPORTS: dict[Format, Callable[[Sequence[Measurement]], str]] = {"csv": csv_text, "json": json_text}
FORMATS: tuple[Format, ...] = ("md", *EXPORTS)


def report(source: Path | str, *, format: Format = "md", out: Path | str | None = None, published: bool = False) -> str:
    """The report on a folder that `bench` measured, or on one record file, as text; also written to `out`.

    format: "md", the tables as markdown; "csv", one flat row a checkpoint and scenario; "json", everything.
    published: the published table beside ours instead, as markdown alone.
    Raises UserError when there are no records, none of a reference, or records that may not stand in one
    table.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}")
    if published and format != "md":
        raise UserError("the published table beside ours is markdown: leave --format out")
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
    crossover = crossover_file(path)
    blocks = crossover_page(read_crossover(crossover)) if crossover else ()
    if crossover and (path == crossover or not (path / RECORDS_NAME).exists()):
        return blocks
    return (*page(measurements(load_records(path))), *blocks)


def draw_plots(source: Path | str) -> list[Path]:
    """Draw the crossover of this folder, or of this record file, as PNG and SVG beside its record.

    Raises UserError where there is none, and as `crossover_plot` does.
    """
    record = crossover_file(Path(source))
    if record is None:
        raise UserError(f"no {CROSSOVER_NAME} in {source}: run `python -m bench.crossover --out {source}` first")
    return crossover_plots(read_crossover(record), record.parent)


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
