"""The crossover's tables, in a report and alone."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.records.crossover import CROSSOVER_NAME, CrossoverEntry
from bench.records.record import Record
from bench.records.store import write as write_records
from quantize.errors import UserError
from reports import report
from reports.cli import main
from reports.crossover import crossover_page, crossover_table, reasons_of, seconds_table
from reports.table import Paragraph

if TYPE_CHECKING:
    from tests.builder import Builder

Write = Callable[[Iterable[Record]], Path]


def test_every_pair_with_the_dense_product_has_a_row(crossover: list[CrossoverEntry]) -> None:
    table = crossover_table(crossover)
    assert table.titles == ["Pair", "Cross over at", "Faster with fewer tokens", "Faster with more"]
    assert table.texts() == [
        ["FP16 / gemm", "91", "gemm", "FP16"],
        ["FP16 / gemv", "4.0", "gemv", "FP16"],
        ["gemm / gemv", "2.0", "gemv", "gemm"],
    ]


def test_who_never_changes_places_is_told_for_the_dense_product_alone(crossover: list[CrossoverEntry]) -> None:
    slow = [
        replace(entry, contender=name, style="GEMM", seconds=tuple(factor * value for value in entry.seconds))
        for name, factor in (("slower", 3.0), ("slowest", 9.0), ("alike", 1.01))
        for entry in crossover
        if entry.contender == "FP16"
    ]
    rows = crossover_table([*(entry for entry in crossover if entry.contender == "FP16"), *slow]).texts()
    assert rows == [
        ["FP16 / slower", "never", "FP16", "FP16"],
        ["FP16 / slowest", "never", "FP16", "FP16"],
        ["FP16 / alike", "—", "neither clearly", "neither clearly"],
    ]


def test_milliseconds_of_every_kernel(crossover: list[CrossoverEntry]) -> None:
    table = seconds_table(crossover)
    assert table.titles == [
        "Kernel", "Style", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024", "2,048",
    ]  # fmt: skip
    rows = {row[0]: row[1:] for row in table.texts()}
    assert list(rows) == ["FP16", "gemm", "gemv", "broken"]
    assert rows["FP16"] == ["dense", *["0.1"] * 9, "0.2", "0.4", "0.8"]
    assert rows["gemv"][-1] == "51.2"
    assert rows["broken"] == ["GEMM", "error", "error", *["—"] * 10]


def test_reasons_are_told_once(crossover: list[CrossoverEntry]) -> None:
    other = replace(crossover[0], contender="too")
    assert reasons_of([other, *crossover]) == (
        "too, compiled: needs the package compiled.",
        "broken at 1 and 2 tokens: wrong: off by 1.",
    )


def prose(entries: list[CrossoverEntry]) -> str:
    return " ".join(block.text for block in crossover_page(entries) if isinstance(block, Paragraph))


def test_the_page_says_what_was_measured_and_how(crossover: list[CrossoverEntry]) -> None:
    text = prose(crossover)
    assert "mistral-7b's shape, float16 on GPU 9" in text
    assert "(q_proj 4,096 x 4,096, down_proj 4,096 x 14,336)" in text
    assert "medians of 5 turns" in text
    assert "Each pass is the replay of a CUDA graph." in text
    eager = [replace(one, mode="eager") if one.contender == "gemv" else one for one in crossover]
    assert "of a CUDA graph, except gemv," in prose(eager)
    fewer = [replace(one, seconds=one.seconds[:1]) if one.tokens == 2048 and one.seconds else one for one in crossover]
    assert "medians of 1 to 5 turns" in prose(fewer)
    on_cpu = prose([replace(one, device="cpu", compute_dtype="float32", mode="eager") for one in crossover])
    assert "float32 on Epyc 9" in on_cpu
    assert "CUDA" not in on_cpu


def test_a_measurement_in_which_nothing_ran_has_reasons_alone(crossover: list[CrossoverEntry]) -> None:
    assert [type(block).__name__ for block in crossover_page(crossover[:1])] == ["Bullets", "Paragraph"]


def test_it_stands_at_the_end_of_the_report(builder: "Builder", write: Write, crossover: list[CrossoverEntry]) -> None:
    folder = write(builder.five_rows())
    before = report(folder, view="full")
    write_records(folder / CROSSOVER_NAME, crossover)
    after = report(folder, view="full")
    assert after.startswith(before)
    assert "| FP16 / gemm |" in after
    assert "FP16 / gemm" not in report(folder, format="csv") + report(folder, format="json")
    assert "FP16 / gemm" not in report(folder, view="versus")


def test_it_can_be_reported_alone(
    tmp_path: Path, crossover: list[CrossoverEntry], capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path / CROSSOVER_NAME, crossover)
    assert main([str(tmp_path)]) == 0
    of_folder = capsys.readouterr().out
    assert "| FP16 / gemm |" in of_folder
    assert main([str(tmp_path / CROSSOVER_NAME)]) == 0
    assert capsys.readouterr().out == of_folder


def test_plots_are_drawn_beside_the_record(
    tmp_path: Path, crossover: list[CrossoverEntry], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write_records(tmp_path / CROSSOVER_NAME, crossover)
    assert main([str(tmp_path), "--plots"]) == 0
    captured = capsys.readouterr()
    assert captured.out == report(tmp_path)
    assert captured.err == f"wrote {tmp_path / 'crossover.png'}\nwrote {tmp_path / 'crossover.svg'}\n"
    assert {path.name for path in tmp_path.iterdir()} == {CROSSOVER_NAME, "crossover.png", "crossover.svg"}


def test_plots_without_matplotlib(
    builder: "Builder",
    write: Write,
    crossover: list[CrossoverEntry],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write(builder.five_rows())
    write_records(folder / CROSSOVER_NAME, crossover)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(folder), "--plots"]) == 2
    assert capsys.readouterr().err == "error: plots need matplotlib: install quantable[plots]\n"


def test_a_broken_crossover_is_one_line(tmp_path: Path) -> None:
    (tmp_path / CROSSOVER_NAME).write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no record"):
        report(tmp_path)
