"""`report` from Python: where records come from, where the text goes, and what is refused."""

import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.records.record import Record
from bench.records.store import append
from quantize.errors import UserError
from quantize.files import write_whole
from reports import report
from reports.api import Reading

if TYPE_CHECKING:
    from tests.builder import Builder

Write = Callable[[Iterable[Record]], Path]


def test_a_folder_or_its_record_file(builder: "Builder", write: Write) -> None:
    folder = write(builder.five_rows())
    text = report(folder)
    assert "| AWQ GEMM" in text
    assert report(folder, view="full").startswith("| Base Model | Method ")
    assert report(str(folder / "records.jsonl")) == text
    assert json.loads(report(folder, format="json"))["measurements"]
    assert report(folder, format="csv").startswith("name,base_model,")


def test_the_same_records_give_the_same_text(builder: "Builder", write: Write) -> None:
    folder = write(builder.five_rows())
    assert report(folder) == report(folder)


def test_out_is_written_whole_and_replaced(builder: "Builder", write: Write, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    out.write_text("old")
    reader = tmp_path / "reader.md"  # someone who opened the old file
    reader.hardlink_to(out)
    text = report(write(builder.five_rows()), out=out)
    assert out.read_text(encoding="utf-8") == text
    assert reader.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".records.jsonl.lock",
        "reader.md",
        "records.jsonl",
        "table.md",
    ]


def test_a_full_disk_leaves_the_old_file(
    builder: "Builder", write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.md"
    out.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*table\.md \(No space left on device\)"):
        write_whole(out, b"new")
    monkeypatch.undo()
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


@pytest.mark.parametrize("out", ["missing/table.md", "folder.md"])
def test_an_out_that_cannot_be_written(builder: "Builder", write: Write, tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        report(write(builder.five_rows()), out=tmp_path / out)


def test_nothing_is_written_when_the_records_are_refused(builder: "Builder", write: Write, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    with pytest.raises(UserError):
        report(write([builder.latency("bnb-4bit")]), out=out)
    assert not out.exists()


def test_an_unknown_format(tmp_path: Path) -> None:
    wrong: Any = "xml"
    with pytest.raises(UserError, match="unknown format 'xml'; there are: text, md, csv, json"):
        report(tmp_path, format=wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n\n", "holds no records"),
        (b"# a readme\n", "line 1 is no record"),
        (b"[1, 2]\n", "line 1 is no record"),
        (b'{"a": 1}\n', "line 1 is no record"),
        (b'{"kind": "latency", "schema_version": 99}\n', "schema version 99"),
        (b'{"schema_version": 1}\n', "line 1 is no record"),
        (b"\x93NUMPY\x01\x00\xff\xfe", "no record file"),
    ],
)
def test_what_is_no_record_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        assert Reading(tmp_path).found


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder or file"):
        assert Reading(tmp_path / "missing").found
    with pytest.raises(UserError, match=r"no record file .*records\.jsonl"):
        assert Reading(tmp_path).found


def test_a_torn_line_is_told_and_counted(tmp_path: Path, builder: "Builder") -> None:
    path = tmp_path / "records.jsonl"
    append(path, builder.latency("fp16"), builder.latency("awq-gemm"), builder.latency("awq-gemv"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], lines[2][:200], lines[2], lines[2][:90]]))
    assert "- records.jsonl is torn in lines 3, 5: a run that was being written there is lost." in report(tmp_path)
    assert "AWQ GEMV" in report(tmp_path)


def put(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "quantable.json").touch()


def test_rows_of_checkpoints_that_are_gone_are_left_out_and_it_is_said(tmp_path: Path, builder: "Builder") -> None:
    names = [record.subject.name for record in builder.five_rows()]
    append(tmp_path / "records.jsonl", *builder.five_rows())
    assert all(name in report(tmp_path, view="full") for name in names)
    put(tmp_path, "Tiny-1M-BnB.4")
    page = report(tmp_path, view="full")
    said = page[page.index("- ") :]
    assert "- Tiny-1M-BnB.8 is not in" in said
    assert "- Tiny-1M-FP16 is not in" not in said, "its rows have no other reference"
    assert "| Tiny-1M-BnB.8" not in page
    assert "BnB.4" in page.splitlines()[3]
    assert "BnB.8" in report(tmp_path / "records.jsonl"), "a file is shown as it is"


def test_the_reference_that_is_gone_makes_room_for_the_one_that_is_there(tmp_path: Path, builder: "Builder") -> None:
    again = builder.subject("fp16", name="Renamed-FP16")
    append(tmp_path / "records.jsonl", builder.latency("fp16"), builder.latency("fp16", subject=again))
    put(tmp_path, "Renamed-FP16")
    page = report(tmp_path, view="full")
    assert "Renamed-FP16 |" in page
    assert "| Tiny-1M-FP16" not in page


@pytest.mark.parametrize("name", ["quantable.json", "weights.bin", "records.jsonl", "copy-of-records"])
def test_no_report_is_written_over_what_is_ours(tmp_path: Path, builder: "Builder", name: str) -> None:
    source = tmp_path / "records.jsonl"
    append(source, builder.latency("fp16"))
    put(tmp_path, "made")
    target = tmp_path / ("made" if name in ("quantable.json", "weights.bin") else "") / name
    if name == "copy-of-records":
        target.write_bytes(source.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"{name} would be written over with a report: give --out another name"):
        report(source, out=target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
