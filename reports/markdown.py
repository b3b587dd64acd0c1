"""A page as GitHub markdown whose raw text reads well too, or on a terminal."""

import io
import re
import textwrap
from typing import Any

from quantize.errors import printable
from reports.table import Block, Bullets, Heading, Link, Page, Table

WIDTH = 110  # of prose; tables are as wide as they need to be
SCREEN_WIDTH, NAME_WIDTH = 80, 30  # names in a first column that are no longer stand on one line


def markdown(page: Page) -> str:
    """The page as markdown text, its blocks an empty line apart, ending in a newline."""
    return "\n\n".join(_block(block) for block in page) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return table_markdown(block)
    if isinstance(block, Heading):
        return f"{'#' * (3 + block.level)} {_escape(block.text)}"
    if isinstance(block, Bullets):
        return "\n".join(_wrap(f"- {_escape(item)}", indent="  ") for item in block.items)
    return _wrap(_escape(block.text))


def table_markdown(table: Table) -> str:
    """One pipe table, every column padded to its widest cell."""
    lines = [[_cell(text) for text in row] for row in (table.titles, *table.texts())]
    widths = [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)]
    pads = [str.ljust if column.align == "left" else str.rjust for column in table.columns]
    columns = list(zip(pads, widths, strict=True))
    padded = [[pad(text, width) for text, (pad, width) in zip(row, columns, strict=True)] for row in lines]
    rule = [pad(":", width, "-") for pad, width in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:]))


def _cell(text: str) -> str:
    """One line, with nothing in it that ends the cell."""
    shown = _escape(" ".join(text.split())).replace("|", "\\|").replace("`", "\\`")
    return f"[{shown}]({text.url})" if isinstance(text, Link) else shown


def _escape(text: str) -> str:
    """Names and reasons hold characters that markdown, or who shows it, would take for something: a link, an image."""
    special = r"[\\*<\[\]]|__|(?<=\w)@(?=\w)|:(?=//)|(?<=\bwww)\."
    return re.sub(special, lambda found: "".join(f"\\{character}" for character in found[0]), printable(text))


def _wrap(text: str, indent: str = "") -> str:
    wrapped = textwrap.fill(
        " ".join(text.split()), width=WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return re.sub(r"(?<=\n)( *\d*)([#>+-]|(?<=\d)[.)])(?= )", r"\1\\\2", wrapped)  # a line begins no heading or list


def screen(page: Page) -> str:
    """The page as on a terminal of 80 columns, without colours."""
    shown = io.StringIO()
    print_page(page, width=SCREEN_WIDTH, file=shown, color_system=None)
    return "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines())


def print_page(page: Page, **options: Any) -> None:
    """The page on a terminal: long cells fold instead of being cut off. options: of rich's Console."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(**options)
    for number, block in enumerate(page):
        if number:
            console.print()
        if isinstance(block, Table):
            shown = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
            texts, wide = block.texts(), console.width >= SCREEN_WIDTH
            for number, column in enumerate(block.columns):
                title = printable(column.title)
                whole = wide and number == 0 and all(len(row[0]) <= NAME_WIDTH for row in texts)
                least = max(map(len, title.split()), default=1) if wide else 1
                most = max([least, *(len(row[number]) for row in texts)]) if column.align == "right" else None
                how: dict[str, Any] = {"no_wrap": whole, "min_width": least, "max_width": most}
                shown.add_column(Text(title), justify=column.align, overflow="fold", **how)
            for row in texts:
                shown.add_row(*(Text(printable(text)) for text in row))
            console.print(shown)
        else:
            lines = [f"- {item}" for item in block.items] if isinstance(block, Bullets) else [block.text]
            for line in lines:
                console.print(Text(printable(line), "bold" if isinstance(block, Heading) else ""))
