"""Writes into README.md and docs/ what `report`, or `python -m tests.lab.pages` for the records of the laboratory,
prints for the records named there: `python -m docs.fill`.

A block begins with `<!-- record: PATH -->`, `<!-- table: PATH -->` for the published table's columns alone,
`<!-- summary: PATH -->` for the table of the screen that `report` prints, or `<!-- engines: PATH -->` and
`<!-- speed: PATH -->` for the section of that name, and ends with `<!-- end -->`. docs/data.md is what
`python -m docs.schema` prints, in words.
"""

import re
from pathlib import Path
from typing import Any

from docs.schema import schema
from reports import report
from reports.api import View
from tests.lab.pages import lab_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md")
LABORATORY = ("race", "overhead", "side_by_side")  # files of its records
SECTIONS = ("engines", "speed")
VIEWS: dict[str, View] = {
    "record": "full",
    "table": "published",
    "summary": "summary",
    **dict.fromkeys(SECTIONS, "full"),
}
BLOCK = re.compile(r"(<!-- (record|table|summary|engines|speed): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every block as its records have it."""

    def block(found: re.Match[str]) -> str:
        view, path = VIEWS[found[2]], ROOT / found[3]
        text = lab_page(path) if path.stem in LABORATORY else report(path, format="md", view=view)
        blocks = text.strip().split("\n\n")
        if found[2] in SECTIONS:
            blocks = blocks[blocks.index(f"### {found[2].capitalize()}") + 1 :]
            blocks = blocks[: next(n for n, one in enumerate(blocks) if one.startswith("### "))]
        shown = "\n\n".join(blocks) if view == "full" else next(one for one in blocks if one.startswith("|"))
        return f"{found[1]}\n{shown}\n\n{found[4]}"

    return BLOCK.sub(block, text)


DATA = """# What the files hold

Made by `python -m docs.fill` from what `python -m docs.schema` prints of records, manifest, sweep and csv: JSON
schemas, from the types that check the files. Units stand in the names; unknown is null, in the CSV empty.
"""
TITLES = {
    "records": "A line of records.jsonl",
    "manifest": "quantable.json, the manifest of a checkpoint",
    "sweep": "sweep.json, a list of cells, and each file of attempts/",
}


def type_of(node: dict[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "anyOf" in node:
        return " or ".join(map(type_of, node["anyOf"]))
    if "enum" in node:
        return ", ".join(map(str, node["enum"]))
    if "$ref" in node:
        return str(node["$ref"].rpartition("/")[2])
    inner = node.get("items") or (node.get("prefixItems") or [node.get("additionalProperties")])[0]
    name = str(node.get("type", "anything"))
    return f"{name} of {type_of(inner)}" if isinstance(inner, dict) else name


def data_page() -> str:
    """docs/data.md: each field of each file in one line."""
    lines = [DATA]
    for what, title in TITLES.items():
        lines += [f"## {title}", ""]
        for name, part in schema(what)["$defs"].items():
            lines += [f"### {name}", "", *([part["description"], ""] if part["description"] else [])]
            fields = part["properties"].items()
            lines += [*(f"- `{field}` ({type_of(node)}): {node['description']}" for field, node in fields), ""]
    lines += ["## Columns of `report --format csv`", ""]
    for one in schema("csv")["fields"]:
        kind = f"{one['type']}, {one['unit']}" if "unit" in one else one["type"]
        lines.append(f"- `{one['name']}` ({kind}): {one['description']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/data.md").write_text(data_page(), encoding="utf-8")
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
