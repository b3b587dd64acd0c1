"""The README shows what its record files say, word for word."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.lab.race import markdown_table
from reports import report

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("mark", "table_of"), [("table", report), ("race", markdown_table)])
def test_the_readme_shows_the_tables_of_its_records(mark: str, table_of: Callable[[Path], str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition(f"<!-- {mark}: ")
    source, _, rest = rest.partition(" -->\n")
    shown, found, _ = rest.partition(f"<!-- end of {mark} -->")
    assert found
    assert shown.strip() == table_of(ROOT / source).strip()


def test_the_gallerys_crossover_page_is_of_its_record() -> None:
    folder = ROOT / "reports" / "gallery" / "cpu-smollm2-135m" / "crossover"
    assert (folder / "table.md").read_text(encoding="utf-8").strip() == report(folder).strip()
