"""A page as GitHub markdown whose raw text reads well too, or on a terminal."""

import textwrap
from typing import TYPE_CHECKING

from reports.table import Align, Block, Bullets, Heading, Page, Paragraph, Table

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 110
"""Prose is wrapped at this column; tables are as wide as they need to be."""


def markdown(page: Page) -> str:
    """The page as markdown text, its blocks an empty line apart, ending in a newline."""
    return "\n\n".join(_block(block) for block in page) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return table_markdown(block)
    if isinstance(block, Heading):
        return f"### {_escape(block.text)}"
    if isinstance(block, Bullets):
        return "\n".join(_wrap(f"- {_escape(item)}", indent="  ") for item in block.items)
    return _wrap(_escape(block.text))


def table_markdown(table: Table) -> str:
    """One pipe table, every column padded to its widest cell."""
    titles = [_cell(title) for title in table.titles]
    rows = [[_cell(text) for text in row] for row in table.texts()]
    aligns = [column.align for column in table.columns]
    widths = [max(3, *(len(row[i]) for row in [titles, *rows])) for i in range(len(titles))]
    rule = [_rule(width, align) for width, align in zip(widths, aligns, strict=True)]
    lines = [_padded(row, widths, aligns) for row in [titles, *rows]]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _padded(row: list[str], widths: list[int], aligns: list[Align]) -> str:
    pad = {"left": str.ljust, "right": str.rjust, "center": str.center}
    cells = [pad[align](text, width) for text, width, align in zip(row, widths, aligns, strict=True)]
    return f"| {' | '.join(cells)} |"


def _rule(width: int, align: Align) -> str:
    return {"left": ":" + "-" * (width - 1), "right": "-" * (width - 1) + ":", "center": ":" + "-" * (width - 2) + ":"}[
        align
    ]


def _cell(text: str) -> str:
    """One line, with nothing in it that ends the cell."""
    return _escape(" ".join(text.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    """Names and reasons hold characters that markdown would take for its own."""
    for mark in ("\\", "*", "<", "__"):
        text = text.replace(mark, "".join(f"\\{character}" for character in mark))
    return text


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), width=WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def print_page(page: Page, console: "Console") -> None:
    """The page on a terminal: long cells fold instead of being cut off."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    for number, block in enumerate(page):
        if number:
            console.print()
        if isinstance(block, Heading):
            console.print(f"[bold]{escape(block.text)}[/bold]", highlight=False)
        elif isinstance(block, Paragraph):
            console.print(escape(block.text), highlight=False)
        elif isinstance(block, Bullets):
            for item in block.items:
                console.print(f"- {escape(item)}", highlight=False)
        else:
            shown = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
            for column in block.columns:
                shown.add_column(escape(column.title), justify=column.align, overflow="fold")
            for row in block.texts():
                shown.add_row(*(escape(text) for text in row))
            console.print(shown)
