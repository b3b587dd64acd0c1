"""Whatever a record says that its schema lets through, `report` makes a page of it or says in one line why not.

The laboratory's pages too. QUANTABLE_EXAMPLES sets how many examples for each kind.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.store import line_of
from quantize.errors import UserError
from reports import report
from tests.builder import Builder
from tests.lab.pages import lab_page
from tests.test_readers import examples, places

GALLERY = Path(__file__).parents[2] / "reports" / "gallery" / "cpu-smollm2-135m"
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**63, -5.0, 1e308, 1e-320, 0.5, "", "x", "../x", "\x1b[2J", "\u202e", "=1+1"),
    *("cpu", "cuda", "latency", "broken", "ok", "fp16", "rtn"),
]
LABORATORY = ("race", "overhead", "side_by_side", "crossover/crossover")
GOOD = {
    "bench": [json.loads(line_of(record)) for record in Builder().five_rows()],
    **{
        name: [json.loads(line) for line in (GALLERY / f"{name}.jsonl").read_text().splitlines()[:12]]
        for name in LABORATORY
    },
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("records")
    yield folder / "records.jsonl"
    assert [path.name for path in folder.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize("kind", GOOD)
@examples(150)
@given(data=st.data())
def test_a_page_or_one_line(kind: str, data: st.DataObject, file: Path) -> None:
    rows = json.loads(json.dumps(GOOD[kind]))
    for _ in range(data.draw(st.integers(1, 3))):
        one = data.draw(st.integers(0, len(rows) - 1))
        path = data.draw(st.sampled_from(list(places(rows[one]))[1:]))
        value = data.draw(st.sampled_from(ODD))
        for row in rows if data.draw(st.booleans()) else [rows[one]]:
            put(row, path, value)
    file.write_text("\n".join(map(json.dumps, rows)))
    for form in ("text", "md", "csv", "json", "html") if kind == "bench" else ("text", "md"):
        try:
            said = lab_page(file) if kind in LABORATORY and form == "md" else report(file, format=form)
        except UserError as error:
            said = str(error)
        assert said.replace("\n", "").isprintable()


def put(row: Any, path: tuple[Any, ...], value: Any) -> None:
    """Exchange what stands at a path, where there is one."""
    for key in path[:-1]:
        row = row[key] if (isinstance(row, dict) and key in row) or (isinstance(row, list) and key < len(row)) else {}
    if (isinstance(row, dict) and path[-1] in row) or (isinstance(row, list) and path[-1] < len(row)):
        row[path[-1]] = value
