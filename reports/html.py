"""The report as one HTML file that opens from the disk: nothing in it asks for anything elsewhere."""

import html
import re
from collections.abc import Iterable, Sequence

from quantize.errors import printable
from reports.table import Block, Bullets, Cell, Heading, Page, Table

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"
"""What a browser may load of and for the page: what stands in it."""

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1a1a1a, #e6e6e6); --faint: light-dark(#dddddd, #3a3a3a);
  --ground: light-dark(#ffffff, #161616); --shade: light-dark(#f4f4f4, #222222) }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  max-width: 1150px; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap;
  overflow-wrap: normal }
th:first-child, td.left, th.left { text-align: left } thead th { background: var(--shade); vertical-align: bottom }
td.left { white-space: normal; min-width: 6rem } th button { all: unset; cursor: pointer; white-space: normal }
th button:focus-visible { outline: 2px solid currentColor } th[aria-sort=ascending] button::after { content: " ▲" }
th[aria-sort=descending] button::after { content: " ▼" }
figure { margin: 1rem 0; overflow-x: auto } figure svg { width: 100%; min-width: 560px; height: auto; display: block }
summary { cursor: pointer; font-weight: bold } code { background: var(--shade); padding: 0 .2rem }
"""

SCRIPT = """
const value = cell => {
  const raw = cell.dataset.value ?? cell.textContent.replaceAll(",", "").match(/[-+]?\\d[\\d.]*(e[-+]?\\d+)?/i)?.[0];
  return raw === undefined || raw === "" ? null : Number(raw);
};
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, row = head.parentElement, body = row.closest("table").tBodies[0];
  const place = [...row.children].indexOf(head), down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const text = head.classList.contains("left");
  for (const other of row.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  const of = line => text ? line.children[place].textContent : value(line.children[place]);
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [of(a), of(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return down * (text ? x.localeCompare(y) : x - y);
  }));
};
document.getElementById("save").onclick = () => {
  const link = document.createElement("a");
  const held = document.getElementById("records").textContent.trim() + "\\n";
  link.href = URL.createObjectURL(new Blob([held], { type: "application/jsonl" }));
  link.download = "records.jsonl";
  link.click();
};
"""


def html_page(summary: Page, everything: Page, figures: Sequence[str], records: Iterable[str]) -> str:
    """The summary, the plots, every table, and the records in it.

    figures: <svg> elements. records: lines of JSON.
    """
    title = next((block.text for block in summary if isinstance(block, Heading)), "report")
    plots = "".join(f"<figure>{svg}</figure>" for svg in figures)
    lines = "\n".join(line.replace("<", "\\u003c") for line in records)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
{blocks_html(summary, 1)}
{plots and f"<h2>Plots</h2>{plots}"}
<details><summary>Every table</summary>
{blocks_html(everything, 2)}
</details>
<p><button id="save">Save the records</button> from which all of this was computed.</p>
<script type="application/jsonl" id="records">
{lines}
</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def blocks_html(page: Page, top: int) -> str:
    """The blocks, one after the other; top: of which level its first headings are."""
    return "\n".join(_block(block, top) for block in page)


def _block(block: Block, top: int) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{_prose(item)}</li>' for item in block.items)}</ul>"
    element = f"h{top + block.level}" if isinstance(block, Heading) else "p"
    return f"<{element}>{_prose(block.text)}</{element}>"


def _table(table: Table) -> str:
    sides = [f' class="{column.align}"' for column in table.columns]
    head = "".join(
        f"<th{side}><button>{_text(title)}</button></th>" for side, title in zip(sides, table.titles, strict=True)
    )
    cells = [
        [f"<td{side}{_raw(cell)}>{_text(text)}</td>" for side, cell, text in zip(sides, row, texts, strict=True)]
        for row, texts in zip(table.rows, table.texts(), strict=True)
    ]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _raw(cell: Cell) -> str:
    """The figure behind what is shown, by which a column is sorted."""
    return f' data-value="{cell!r}"' if isinstance(cell, int | float) else ""


def _prose(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", _text(text))


def _text(text: str) -> str:
    return html.escape(printable(text))
