"""Our decode loop raced against `generate`, on a tiny random model."""

from pathlib import Path

import pytest

from tests.lab.overhead import main
from tests.lab.pages import lab_page
from tests.lab.records import OverheadRecord, read_lab


def test_both_loops_take_turns_and_leave_a_record(
    tiny_reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "overhead.jsonl"
    assert main([str(tiny_reference), "--out", str(out), "--prompt", "8", "--new", "33", "--rounds", "3"]) == 0
    (record,) = read_lab(out, OverheadRecord)
    assert (record.checkpoint, record.compute_dtype) == (tiny_reference.name, "float32")
    assert (record.scenario.prompt_tokens, record.scenario.decode_steps) == (8, 32)
    assert {name: len(seconds) for name, seconds in record.decode_s_a_token.items()} == {"ours": 3, "generate": 3}
    assert all(value > 0 for seconds in record.decode_s_a_token.values() for value in seconds)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"decode, ours over generate: x{record.ratio:.3f} (")
    assert captured.out.endswith(", 3 rounds\n")
    assert captured.err == ""
    assert tiny_reference.name in lab_page(out)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "overhead.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
