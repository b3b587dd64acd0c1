"""The crossover's tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.records.store import append
from quantize.errors import UserError
from reports.cli import main
from reports.table import Paragraph
from tests.lab.crossover.crossings import CROSSOVER_NAME
from tests.lab.crossover.page import crossover_page, crossover_table, reasons_of, seconds_table
from tests.lab.pages import lab_page
from tests.lab.records import CrossoverEntry

GALLERY = Path(__file__).resolve().parents[3] / "reports" / "gallery"


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


@pytest.mark.parametrize("folder", ["cpu-smollm2-135m/crossover", "h100-mistral-7b", "h200-mistral-7b"])
def test_the_gallerys_pages_are_of_their_records(folder: str) -> None:
    [page] = (GALLERY / folder).glob("table.md" if folder.endswith("crossover") else "crossover.md")
    assert page.read_text(encoding="utf-8") == lab_page(GALLERY / folder / CROSSOVER_NAME)


def test_two_measurements_in_one_file_are_refused(tmp_path: Path, crossover: list[CrossoverEntry]) -> None:
    append(tmp_path / CROSSOVER_NAME, *crossover, replace(crossover[0], shape="other"))
    with pytest.raises(UserError, match="measurements of 2 settings"):
        lab_page(tmp_path / CROSSOVER_NAME)


def test_report_says_in_one_line_what_prints_it(
    tmp_path: Path, crossover: list[CrossoverEntry], capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path / CROSSOVER_NAME, *crossover)
    assert main([str(tmp_path / CROSSOVER_NAME)]) == 2
    assert "`python -m tests.lab.pages FILE` prints them" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no record file {tmp_path / 'records.jsonl'}: run `bench` first\n"
