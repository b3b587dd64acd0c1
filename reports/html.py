"""The report as one HTML file that opens from the disk: nothing in it asks for anything elsewhere."""

import html
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

from quantize.errors import printable
from reports.table import Block, Bullets, Cell, Heading, Page, Table

TEMPLATE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
"""How the page looks and sorts, and what a browser may load of it (Content-Security-Policy): what stands in it."""


def html_page(summary: Page, everything: Page, figures: Iterable[str], records: Iterable[str]) -> str:
    """The summary, the plots (figures: <svg> elements), every table, and the records (lines of JSON) in it."""
    shown = tuple(summary)
    plots = "".join(f"<figure>{svg}</figure>" for svg in figures)
    return TEMPLATE.substitute(
        title=_text(next((block.text for block in shown if isinstance(block, Heading)), "report")),
        summary="\n".join(_block(block, 1) for block in shown),
        plots=plots and f"<h2>Plots</h2>{plots}",
        everything="\n".join(_block(block, 2) for block in everything),
        records="\n".join(line.replace("<", "\\u003c") for line in records),
    )


def _block(block: Block, top: int) -> str:
    """top: of which level the page's first headings are."""
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{_prose(item)}</li>' for item in block.items)}</ul>"
    element = f"h{top + block.level}" if isinstance(block, Heading) else "p"
    return f"<{element}>{_prose(block.text)}</{element}>"


def _table(table: Table) -> str:
    sides = [f' class="{column.align}"' for column in table.columns]
    head = [f"<th{side}><button>{_text(title)}</button></th>" for side, title in zip(sides, table.titles, strict=True)]
    body = [
        [f"<td{side}{_raw(cell)}>{_text(text)}</td>" for side, cell, text in zip(sides, row, texts, strict=True)]
        for row, texts in zip(table.rows, table.texts(), strict=True)
    ]
    top, *rows = (f"<tr>{''.join(cells)}</tr>" for cells in (head, *body))
    return f'<div class="wide"><table><thead>{top}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _raw(cell: Cell) -> str:
    """The figure behind what is shown, by which a column is sorted."""
    return f' data-value="{cell!r}"' if isinstance(cell, int | float) else ""


def _prose(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", _text(text))


def _text(text: str) -> str:
    return html.escape(printable(text))
