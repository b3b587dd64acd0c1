"""Writes into README.md and docs/ what `report` prints for the records named there: `python -m docs.fill`.

A block begins with `<!-- record: PATH -->`, or with `<!-- table: PATH -->` for the first table alone, and ends with
`<!-- end -->`.
"""

import re
from pathlib import Path

from reports import report

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md")
BLOCK = re.compile(r"(<!-- (record|table): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every block as its records have it."""

    def block(found: re.Match[str]) -> str:
        printed = report(ROOT / found[3], view="full").strip()
        shown = printed.split("\n\n")[0] if found[2] == "table" else printed
        return f"{found[1]}\n{shown}\n\n{found[4]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
