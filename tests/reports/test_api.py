"""`report` from Python: where records come from, where the text goes, and what is refused."""

import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.records.record import Record
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
    assert text.startswith("| Base Model | Method ")
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


@pytest.mark.parametrize("out", ["missing/table.md", "."])
def test_an_out_that_cannot_be_written(builder: "Builder", write: Write, tmp_path: Path, out: str) -> None:
    with pytest.raises(UserError, match="cannot write"):
        report(write(builder.five_rows()), out=tmp_path / out)


def test_nothing_is_written_when_the_records_are_refused(builder: "Builder", write: Write, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    with pytest.raises(UserError):
        report(write([builder.latency("bnb-4bit")]), out=out)
    assert not out.exists()


def test_an_unknown_format(tmp_path: Path) -> None:
    wrong: Any = "xml"
    with pytest.raises(UserError, match="unknown format 'xml'; there are: md, csv, json"):
        report(tmp_path, format=wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n\n", "holds no records"),
        (b"# a readme\n", "line 1 is no record"),
        (b"[1, 2]\n", "line 1 is no record"),
        (b'{"a": 1}\n', "line 1 is no record"),
        (b'{"kind": "race", "schema_version": 99}\n', "schema version 99"),
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
