"""Published quantization tables, one TOML file each, and ours beside them."""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bench.records.record import Phase, Record, Subject
from quantize.errors import UserError
from quantize.schema import from_data
from quantize.shell import Parser, command, say
from quantize.units import aligned
from quantize.variant import NATIVE_KERNEL, known_variants
from reports.compatibility import HEADLINE
from reports.notes import dummy_text, machine_text, shape_text
from reports.results import Measurement, Result
from reports.table import Cell, Column, Heading, Page, Paragraph, Row, Table, titled

BIOMISTRAL = "biomistral-7b"


@dataclass(frozen=True)
class PublishedRow:
    """One row as published, None where it leaves a cell empty.

    base_model:   as the table names it; method: the same.
    variant:      of known_variants() that it is, None for what this program does not make or read.
    time:         over that of the half-precision row; tokens_per_s: where the table has speeds instead.
    scenario:     of the suite of the same name, in which it was measured."""

    base_model: str
    method: str
    variant: str | None = None
    q_group_size: int | None = None
    vram_gb: float | None = None
    time: float | None = None
    tokens_per_s: float | None = None
    scenario: str = HEADLINE

    @property
    def w_bit(self) -> int | None:
        return known_variants()[self.variant].w_bit if self.variant else None

    @property
    def version(self) -> str | None:
        return known_variants()[self.variant].version if self.variant else None


@dataclass(frozen=True)
class PublishedTable:
    """A table as its source has it.

    title:      in words; source: where it stands.
    engine, machine: what ran it; memory: what is in that figure; speed: which tokens count in that one.
    phase:      whose time the speed is of.
    scenarios:  what each was, by name.
    layers, hidden_size: of every model in it."""

    title: str
    source: str
    engine: str
    machine: str
    memory: str
    speed: str
    layers: int
    hidden_size: int
    row: tuple[PublishedRow, ...]
    phase: Phase = "total"
    scenarios: dict[str, str] = field(default_factory=dict)

    def time(self, row: PublishedRow) -> float | None:
        """A row's time over that of the half-precision row in its scenario."""
        if row.time is not None or row.tokens_per_s is None:
            return row.time
        base = (one.tokens_per_s for one in self.row if one.variant == "fp16" and one.scenario == row.scenario)
        reference = next(base, None)
        return reference / row.tokens_per_s if reference else None

    def about(self) -> str:
        """Where it is from and what its figures mean."""
        said = f"Engine: {self.engine}. Machine: {self.machine}. Memory: {self.memory}. Speed: {self.speed}."
        return f"Published: {self.source}. {said}"

    def of_its_shape(self, measurement: Measurement) -> bool:
        """False where random weights were measured in another shape than the published models'."""
        drawn = [result.subject for result in measurement.results if result.subject.dummy]
        return all((one.dummy_layers, one.dummy_hidden_size) == (self.layers, self.hidden_size) for one in drawn)


@cache
def published_tables() -> dict[str, PublishedTable]:
    """By name, the published quantization table that this program began with first."""
    paths = sorted(Path(__file__).parent.glob("*.toml"), key=lambda path: (path.stem != BIOMISTRAL, path.stem))
    return {path.stem: from_data(PublishedTable, tomllib.loads(path.read_text("utf-8")), path.name) for path in paths}


def published_table_named(name: str) -> PublishedTable:
    """Raises UserError for a name that is none."""
    tables = published_tables()
    if name not in tables:
        raise UserError(f"no published table {name!r}; there are: {', '.join(tables)}")
    return tables[name]


def versus_page(found: Sequence[Measurement], name: str = BIOMISTRAL) -> Page:
    """The rows of a published table beside the measured ones, for each measurement; what was not measured is a dash.

    A second table has the rows measured on each layout's own kernel, where there are some: the first table's were."""
    table = published_table_named(name)
    for measurement in found:
        if len(found) > 1:
            yield Heading(f"On {measurement.device}")
        yield Table.of(_row(table, measurement, row, _measured(measurement, row, None)) for row in table.row)
        native = ((row, _measured(measurement, row, NATIVE_KERNEL)) for row in table.row)
        rows = Table.of(_row(table, measurement, row, result) for row, result in native if result)
        yield from titled("The same layouts on the kernels that their names stood for:", rows)
        headline, its_shape = measurement.headline, f"{table.layers} layers, hidden size {table.hidden_size}"
        shape = f"It is not the shape of the published models ({its_shape}), so that nothing here compares with a "
        shape = "" if table.of_its_shape(measurement) else f"{shape}published figure."
        protocol = f"`{HEADLINE}` ({shape_text(headline)})" if headline else f"other scenarios than `{HEADLINE}`"
        where = f"Measured: {protocol} on {machine_text(measurement)}."
        quotients = "Quotients are measured over published: below x1.00 is less. The rest: docs/method.md."
        parts = (table.about(), where, dummy_text(measurement), shape, quotients)
        yield Paragraph(" ".join(filter(None, parts)))


def _row(table: PublishedTable, measurement: Measurement, row: PublishedRow, result: Result | None) -> Row:
    scenario = next((one for one in measurement.scenarios if one.name == row.scenario), None)
    timing = result.timing(scenario) if result else None
    time: float | str | None = None
    if result:
        time = result.ratio_in(timing, table.phase) if timing else result.status_in(scenario)
    peak, published_time = timing.run_peak_bytes if timing else None, table.time(row)
    comparable, published_bytes = table.of_its_shape(measurement), row.vram_gb and row.vram_gb * 1e9

    def over(found: Cell, published: float | None) -> float | None:
        return found / published if isinstance(found, int | float) and published and comparable else None

    return [
        *checkpoint_cells(row, f"{row.method}, broken" if result and result.broken else row.method),
        (Column("At", optional=True), table.scenarios.get(row.scenario)),
        (Column("Published VRAM GB", "gigabytes"), published_bytes),
        (Column("Measured weights GB", "gigabytes"), result.weights_bytes if result else None),
        (Column(f"Measured peak {measurement.memory_name} GB", "gigabytes"), peak),
        (Column("Peak / published", "ratio"), over(peak, published_bytes)),
        (Column("Published tokens/s", "per_second", optional=True), row.tokens_per_s),
        (Column("Published Time", "ratio"), published_time),
        (Column("Measured Time", "ratio"), time),
        (Column("Time / published", "ratio"), over(time, published_time)),
    ]


def checkpoint_cells(row: Subject | PublishedRow, method: str) -> Row:
    """What the published table says of a checkpoint before its figures."""
    return [
        (Column("Base Model"), row.base_model),
        (Column("Method"), method),
        (Column("q_group_size", "count", missing=""), row.q_group_size),
        (Column("w_bit", "count", missing=""), row.w_bit),
        (Column("version", missing=""), row.version),
    ]


def has_published_rows(records: Iterable[Record]) -> bool:
    """Whether one of these records is of a row of the published table that this program began with."""
    rows = published_table_named(BIOMISTRAL).row
    return any(_is_of(subject, row) for subject in {record.subject for record in records} for row in rows)


def _measured(measurement: Measurement, row: PublishedRow, kernel: str | None) -> Result | None:
    """What was measured of a published row on the kernel of this name, None for the one that was chosen by itself."""
    of_row = (result for result in measurement.results if _is_of(result.subject, row))
    return next((result for result in of_row if result.subject.kernel == kernel), None)


def _is_of(subject: Subject, row: PublishedRow) -> bool:
    ours = (subject.base_model, subject.variant, subject.q_group_size)
    return ours == (row.base_model, row.variant, row.q_group_size)


def parser() -> Parser:
    about = "List the published tables that `report DIR --published NAME` sets beside what was measured."
    return Parser(prog="quantable published", description=about)


def run(options: Any) -> None:
    say(*aligned([(name, table.title, table.source) for name, table in published_tables().items()]))


main = command(parser, run)
