"""The report as one HTML file: nothing foreign in it, whole in a browser, and its tables sort."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.records.store import append
from reports import report

if TYPE_CHECKING:
    from tests.builder import Builder

GALLERY = Path(__file__).parents[2] / "reports" / "gallery" / "cpu-smollm2-135m"
CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000"),
]
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

VOID = {"meta", "link", "br", "use", "path"}


class Balance(HTMLParser):
    """Fails where an element is closed that is not open; holds the text of the scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.open: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset") and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_it_is_whole_and_asks_for_nothing() -> None:
    text = report(GALLERY, format="html")
    read = Balance()
    read.feed(text)
    assert read.open == []
    assert [one for one in read.asked if not one.startswith(("#", "data:"))] == []
    assert "@import" not in text
    assert "url(http" not in text
    records = re.search(r'<script type="application/jsonl" id="records">\n(.*?)\n</script>', text, re.DOTALL)
    assert records
    assert len([json.loads(line) for line in records[1].splitlines()]) == len(
        (GALLERY / "records.jsonl").read_text().splitlines()
    )


def test_a_name_is_text_whatever_is_in_it(tmp_path: Path, builder: "Builder") -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    subject = replace(builder.subject("awq-gemm", name=evil), download=evil)
    append(tmp_path / "records.jsonl", *builder.five_rows(), builder.latency("awq-gemm", subject=subject))
    text = report(tmp_path, format="html")
    assert "<script>alert" not in text
    assert "<img" not in text


def test_it_is_written_anew_over_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        text = report(GALLERY, out=tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == text


def opened(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The page in a browser; what it says on its console is on stderr."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@browser
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_an_error(tmp_path: Path, width: int, dark: bool) -> None:
    page = tmp_path / "report.html"
    text = report(GALLERY, format="html")
    measured = """<script>
      document.body.style.width = WIDTH + "px"; document.querySelector("details").open = true;
      const over = [...document.body.children].filter(one => one.offsetWidth > WIDTH).map(one => one.tagName);
      document.title = JSON.stringify([over, getComputedStyle(document.body).backgroundColor]);
    </script></body>""".replace("WIDTH", str(width - 32))
    page.write_text(text.replace("</body>", measured), encoding="utf-8")
    done = opened(page, tmp_path, "--dump-dom", f"--window-size={width},900", *["--force-dark-mode"] * dark)
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    over, ground = json.loads(title[1].replace("&quot;", '"'))
    assert over == [], "no element is wider than the page: tables and plots scroll in themselves"
    assert ground == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")


@browser
def test_a_click_on_a_title_sorts_the_table(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    clicked = """<script>
      const click = place => document.querySelectorAll("th button")[place].click();
      const column = place => [...document.querySelector("tbody").rows].map(row => row.children[place].textContent);
      click(2); const up = column(2); click(2); const down = column(2); click(0); const names = column(0);
      click(5); const change = column(5);
      document.title = JSON.stringify([up, down, names, change]);
    </script></body>"""
    page.write_text(report(GALLERY, format="html").replace("</body>", clicked), encoding="utf-8")
    done = opened(page, tmp_path, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    up, down, names, change = json.loads(title[1].replace("&quot;", '"'))
    assert up == sorted(up, key=float)
    assert down == up[::-1]
    assert names == sorted(names)
    assert change == ["+1.8%", "+6.0%", "+7.3%", ""], "what has no figure stands last"
