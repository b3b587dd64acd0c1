"""The README shows what its record file says, word for word."""

from pathlib import Path

from bench.race import markdown_table
from reports import report

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_table_of_its_records() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("<!-- table: ")
    folder, _, rest = rest.partition(" -->\n")
    shown, found, _ = rest.partition("<!-- end of table -->")
    assert found
    assert shown.strip() == report(ROOT / folder).strip()


def test_the_readme_shows_the_race_of_its_records() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("<!-- race: ")
    path, _, rest = rest.partition(" -->\n")
    shown, found, _ = rest.partition("<!-- end of race -->")
    assert found
    assert shown.strip() == markdown_table(ROOT / path).strip()
