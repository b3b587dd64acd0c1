"""The README and the results show what the records say, word for word."""

import re
from pathlib import Path

import pytest

from docs.fill import BLOCK, PAGES, filled
from reports import report

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "reports" / "gallery" / "cpu-smollm2-135m"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_report_prints(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert filled(text) == text


def test_a_figure_changed_by_hand_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"x\d\.\d[1-9] ", text)
    assert found
    changed = text.replace(found[0], f"{found[0][:-2]}0 ", 1)
    assert filled(changed) == text


def test_the_readme_is_short_and_shows_the_answer_and_the_published_table() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert sum(line.startswith("|") for line in lines) == (2 + 4) + (2 + 5)
    assert any("quantize org/name" in line for line in lines[:10])


@pytest.mark.parametrize("session", ["table", "tests"])
def test_the_readme_has_the_commands_that_set_everything_up(session: str) -> None:
    command = f"    python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox -s {session}"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/method.md"])
def test_a_ratio_in_the_text_stands_in_a_table(page: str) -> None:
    tables = "".join(block[0] for block in BLOCK.finditer((ROOT / "docs/results.md").read_text(encoding="utf-8")))
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    measured = set(re.findall(r"\bx\d+\.\d+", tables))
    assert set(re.findall(r"\bx\d+\.\d+", text)) <= measured


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_what_a_page_links_to_exists(page: str) -> None:
    path = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "folder",
    ["same-twice", "broken-by-autoawq", ".", "../cpu-amx-smollm2-135m", "../h100-mistral-7b", "../h200-mistral-7b"],
)
def test_the_gallerys_pages_are_of_their_records(folder: str) -> None:
    page = (GALLERY / folder / "table.md").read_text(encoding="utf-8")
    assert page.strip() == report(GALLERY / folder, view="full").strip()
