"""The page of a sweep: a row a model and machine, then each model's own page; no figure over one of another machine."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.records.store import write
from bench.sweep.cell import Attempt, Cell
from quantize.schema import to_data
from reports import report
from reports.api import Reading
from tests.builder import CHAT, ENVIRONMENT

if TYPE_CHECKING:
    from tests.builder import Builder


@pytest.fixture
def swept(new_builder: "type[Builder]", tmp_path: Path) -> Path:
    """Two models, measured on two machines of which the second is twice as fast, and one that failed."""
    cells = []
    for name, cpu, factor in (("A", "Epyc 9", 1.0), ("B", "Xeon 5", 0.5), ("C", "", 0.0)):
        cell = Cell(name, (), None, ((), ()), ())
        cells.append(cell)
        if not factor:
            Attempt(name, cell.key, "failed", "is damaged: download it again").write(tmp_path)
            continue
        one = new_builder(name, environment=replace(ENVIRONMENT, cpu=cpu))
        speeds = {"fp16": factor, "awq-gemm": factor / 2, "bnb-4bit": factor / 4}
        records = [*one.rounds(speeds, CHAT), one.quality("fp16", 10.0)]
        records += [one.quality("awq-gemm", 10.1), one.quality("bnb-4bit", 11.0)]
        write(tmp_path / name / "records.jsonl", records)
        Attempt(name, cell.key, "done", seconds=60.0).write(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps(to_data(cells)))
    return tmp_path


def test_a_row_a_model_then_its_own_page(swept: Path) -> None:
    blocks = report(swept).split("\n\n")
    assert blocks[0] == "### 3 models, 2 machines"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in blocks[1].splitlines()[2:]]
    # Decoded tokens a second of each machine's own, marked beside its own FP16; the fastest loses too much.
    assert rows == [
        ["A", "A", "AWQ GEMM, group 64", "+1.0%", "▲ 50.0", "0.500"],
        ["B", "B", "AWQ GEMM, group 64", "+1.0%", "▲ 100", "0.500"],
        ["C", "", "failed", "—", "—", "—"],
    ]
    assert "C: failed: is damaged: download it again." in blocks[2]
    assert "A: a CPU (Epyc 9, 2 threads).\n- B: a CPU (Xeon 5, 2 threads)." in blocks[3]
    pages = [block for block in blocks if block.startswith("### ")][1:]
    assert [page.partition(" (")[0] for page in pages] == ["### A on a CPU", "### B on a CPU"]
    assert "2.0 times FP16" not in blocks[1]


@pytest.mark.parametrize("name", ["A", "B"])
def test_each_page_is_the_models_own(swept: Path, name: str) -> None:
    assert report(swept / name).strip() in report(swept)
    assert report(swept / name, view="full").strip().split("\n\n")[-2] in report(swept, view="full")


def test_a_sweep_that_has_measured_nothing_says_how_it_stands(swept: Path) -> None:
    for name in ("A", "B"):
        (swept / name / "records.jsonl").unlink()
    assert [line.split("|")[3].strip() for line in report(swept).splitlines() if line.startswith("|")][2:] == [
        "waiting", "waiting", "failed",
    ]  # fmt: skip
    (swept / "A" / "records.jsonl").write_text("{}\n")
    assert "A: done in 60 s: " in " ".join(report(swept, format="text").split())


def test_every_format_has_both_and_a_failure_is_the_exit_code(swept: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(report(swept, format="csv"))))
    assert {row["base_model"] for row in rows} == {"A", "B"}
    assert len(json.loads(report(swept, format="json"))["measurements"]) == 2
    assert "Xeon 5" in report(swept, format="html")
    assert report(swept, view="published").count("\n| A ") == 3
    reading = Reading(swept)
    assert reading.measurements
    assert not reading.sound
