"""A table: typed columns and raw values. Every decision on how a value looks is made here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "text", "count", "calls", "gigabytes", "ratio", "times", "range", "per_second", "milliseconds", "perplexity",
    "nats", "share", "change", "error",
]  # fmt: skip
Cell = str | int | float | tuple[float, float] | None

UNKNOWN = "—"


class Link(str):
    """A cell's text that leads to `url` where a page can show that."""

    url: str


@dataclass(frozen=True)
class Column:
    """A column's title and what its values are: FORMATS has how each kind looks.

    A string is shown as it is in any column ("oom", "2 rounds"), None as `missing`: a dash for what is unknown, nothing
    for what does not apply. An `optional` column is left out where it would be empty (`Table.of`)."""

    title: str
    kind: Kind = "text"
    missing: str = UNKNOWN
    optional: bool = False

    @property
    def align(self) -> Literal["left", "right"]:
        return "left" if self.kind == "text" else "right"

    def text(self, cell: Cell) -> str:
        if cell is None:
            return self.missing
        return cell if isinstance(cell, str) else FORMATS[self.kind](cell)


Row = Sequence[tuple[Column, Cell]]  # each cell with its column


@dataclass(frozen=True)
class Table:
    """Columns and rows of raw values, one cell a column."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def titles(self) -> list[str]:
        return [column.title for column in self.columns]

    @staticmethod
    def of(rows: Iterable[Row]) -> "Table":
        """A table of rows that name their columns, which are those of the first row; without rows it has none."""
        rows = list(rows)
        columns = [column for column, _ in rows[0]] if rows else []
        kept = [n for n, one in enumerate(columns) if not one.optional or any(row[n][1] is not None for row in rows)]
        return Table(tuple(columns[n] for n in kept), tuple(tuple(row[n][1] for n in kept) for row in rows))

    def texts(self) -> list[list[str]]:
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]


@dataclass(frozen=True)
class Heading:
    """level: 0, or 1 for one under another."""

    text: str
    level: int = 0


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


Block = Table | Heading | Paragraph | Bullets
Page = Iterable[Block]  # what a report shows, from top to bottom


def titled(title: str, table: Table) -> list[Block]:
    """The table under a line that says what it shows; nothing where it has no rows."""
    return [Paragraph(title), table] if table.rows else []


def bulleted(lines: Iterable[str]) -> list[Block]:
    """A line each, where there are some."""
    return [Bullets(items)] if (items := tuple(lines)) else []


def ratio_text(value: float) -> str:
    """x1.41; from 100 on without decimals: x14,889."""
    return f"x{value:,.0f}" if value >= 100 else f"x{value:.2f}"


def gigabytes_text(value: float) -> str:
    """Bytes in GB (1e9 bytes), without the unit: 15.02, 0.269, 141.0."""
    size = value / 1e9
    return f"{size:.1f}" if size >= 100 else f"{size:.2f}" if size >= 1 else f"{size:.3f}"


def per_second_text(value: float) -> str:
    """Three digits, and never fewer than all before the point: 0.0312, 1.52, 24.8, 1,318."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


FORMATS: dict[Kind, Callable[[Any], str]] = {
    "text": str,
    "count": str,
    "calls": lambda value: f"{value:g}",  # how often, a pass
    "gigabytes": gigabytes_text,
    "ratio": ratio_text,
    "times": lambda value: f"x{value:.3g}",  # a ratio of any size in three digits: x0.0214, x0.873, x77.3
    "range": lambda value: f"{value[0]:.2f} to {value[1]:.2f}",  # two ratios: 1.38 to 1.45
    "per_second": per_second_text,
    "milliseconds": lambda value: per_second_text(value * 1000),  # of seconds: 0.131, 2.40, 81.5, 1,318
    "perplexity": lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.2f}",  # 14.93; 222,316
    "nats": lambda value: f"{value:.4f}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}",  # 0.0628; 3e-05
    "share": lambda value: f"{value:.1%}",
    "change": lambda value: f"{value:+.1%}",
    "error": lambda value: f"{value:.1e}",  # 3.1e-07
}
