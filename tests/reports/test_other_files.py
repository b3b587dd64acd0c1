"""What `report` says of other files of records, and `report --all`."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.records.store import append
from quantize.errors import UserError
from reports import report
from reports.api import write_all
from reports.cli import main

if TYPE_CHECKING:
    from tests.builder import Builder

GALLERY = Path(__file__).resolve().parents[2] / "reports" / "gallery"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no records: run `bench` first"):
        report(tmp_path / "empty.jsonl")


def test_a_record_of_the_laboratory_among_ours_is_refused(tmp_path: Path, builder: "Builder") -> None:
    append(tmp_path / "mixed.jsonl", builder.latency("fp16"))
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write((GALLERY / "h200-mistral-7b" / "crossover.jsonl").read_text())
    with pytest.raises(UserError, match="line 2: these are records of the laboratory"):
        report(tmp_path / "mixed.jsonl")


@pytest.mark.parametrize(
    "path",
    [
        *("architectures", "h200-mistral-7b/profile", "h200-mistral-7b/crossover"),
        *(f"cpu-smollm2-135m/{name}" for name in ("race", "overhead", "side_by_side")),
    ],
)
def test_a_file_of_the_laboratory_is_one_line_that_says_what_prints_it(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(GALLERY / f"{path}.jsonl")]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        f"{path}.jsonl, line 1: these are records of the laboratory, `python -m tests.lab.pages FILE` prints them\n"
    )
    copy = tmp_path / "copy"
    copy.write_bytes((GALLERY / f"{path}.jsonl").read_bytes())
    assert main([str(GALLERY / "makers"), "--out", str(copy), "--format", "md"]) == 2
    assert "would be written over with a report" in capsys.readouterr().err


def test_a_report_never_takes_the_place_of_a_record_file(
    tmp_path: Path, builder: "Builder", capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl"
    append(path, *builder.five_rows())
    before = path.read_bytes()
    for out in (path, tmp_path / "other.jsonl"):
        assert main([str(path), "--out", str(out)]) == 2
        assert "would be written over with a report" in capsys.readouterr().err
    assert path.read_bytes() == before


# Every page of a folder


def test_all_writes_every_page_that_there_are_records_for(
    tmp_path: Path, builder: "Builder", capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    append(tmp_path / "records.jsonl", *builder.five_rows())
    append(tmp_path / "second.jsonl", *builder.five_rows())
    assert main([str(tmp_path), "--all"]) == 0
    plots = [f"{name}.{form}" for name in ("loss", "time", "memory") for form in ("png", "svg")]
    names = ["table.md", *plots, "second.md"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / name}" for name in names]
    assert (tmp_path / "table.md").read_text() == report(tmp_path, view="full")
    assert (tmp_path / "second.md").read_text() == report(tmp_path / "second.jsonl", view="full")


def test_all_writes_the_published_table_beside_ours_where_a_row_is_of_it(
    tmp_path: Path, new_builder: "type[Builder]"
) -> None:
    append(tmp_path / "records.jsonl", *new_builder("BioMistral-7B").five_rows())
    written, problems, sound = write_all(tmp_path)
    assert [path.name for path in written][:2] == ["table.md", "published.md"]
    assert (tmp_path / "published.md").read_text() == report(tmp_path, view="versus")
    assert (problems, sound) == ([], True)


def test_a_page_that_cannot_be_written_leaves_the_others(
    tmp_path: Path, builder: "Builder", capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path / "records.jsonl", builder.quality("awq-gemm", 15.0))
    append(tmp_path / "own.jsonl", *builder.five_rows())
    assert main([str(tmp_path), "--all"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote {tmp_path / 'own.md'}"
    assert out[1].startswith("no table.md: no record of the reference")
    (tmp_path / "records.jsonl").write_text("no records\n")
    assert main([str(tmp_path), "--all"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {tmp_path / 'own.md'}"


def test_all_is_of_a_folder_and_goes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([tmp_path / "none"], [tmp_path], [tmp_path, "--plots"]):
        assert main([*map(str, arguments), "--all"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "is no folder" in errors[0]
    assert "holds no record files" in errors[1]
    assert "leave the other options out" in errors[2]
