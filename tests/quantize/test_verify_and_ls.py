"""verify reads every file; ls reads the manifests alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantize import ls, verify
from quantize.checkpoint import MANIFEST_NAME, Manifest, SourceFacts, seal


def make(folder: Path, variant: str = "awq-gemm", kind: str = "hub") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "README.md").write_text("The source's.")
    source = SourceFacts(kind, "org/Tiny" if kind == "hub" else "/home/me/Tiny", "0123abcd" * 5, "ff" * 32)
    facts: dict[str, Any] = {"options": {}, "libraries": {}, "seconds": {}, "created": "2025-01-01T00:00:00+00:00"}
    seal(folder, Manifest(folder.name, "Tiny", variant, 64, source, None, weights_bytes=2_000_000, **facts))
    return folder


def test_whole_checkpoints_verify_with_what_belongs_to_their_cards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other", "fp16")
    (one / "README.md").write_text("A card.")
    (one / "LICENSE.txt").write_text("MIT")
    (one / ".gitattributes").write_text("")
    (one / ".eval_results").mkdir()
    (one / ".eval_results" / "any.yaml").write_text("[]")
    assert verify.main([str(tmp_path), str(one)]) == 0
    assert capsys.readouterr().out == f"{one}: whole\n{other}: whole\n"


def test_every_fault_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    (one / "model.safetensors").unlink()
    (one / "more.safetensors").write_text("?")
    (one / "LICENSE").mkdir()
    (one / "LICENSE" / "own.py").write_text("?")
    (other / MANIFEST_NAME).write_text("{")
    assert verify.main([str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    extra = f"is no file of this checkpoint, {MANIFEST_NAME} says"
    assert found[str(one)] == ["model.safetensors is missing", f"LICENSE/own.py {extra}", f"more.safetensors {extra}"]
    assert "is damaged" in found[str(other)][0]
    assert verify.main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert verify.main([str(tmp_path / "empty")]) == 2


def test_ls_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "Tiny-AWQ")
    make(tmp_path / "Tiny-FP16", "fp16", "folder")
    (tmp_path / ".Tiny.unfinished").mkdir()
    (tmp_path / "records.jsonl").touch()
    assert ls.main([str(tmp_path)]) == 0
    title, awq, fp16, *rest = capsys.readouterr().out.splitlines()
    assert title.split("  ")[0] == "Checkpoint"
    assert awq.split() == ["Tiny-AWQ", "Tiny", "awq-gemm", "0.002", "2025-01-01", "hub", "org/Tiny", "0123abcd"]
    assert fp16.split()[-3:] == ["folder", "Tiny", "0123abcd"]
    assert rest == ["records: records.jsonl", "unfinished: .Tiny.unfinished"]
    (tmp_path / "Tiny-AWQ" / MANIFEST_NAME).write_text("{")
    assert ls.main([str(tmp_path), "--json"]) == 1
    damaged, whole = json.loads(capsys.readouterr().out)["checkpoints"]
    assert "is damaged" in damaged["problem"]
    assert whole["weights GB"] == 0.002
    assert ls.main([str(tmp_path / "nowhere")]) == 2
    assert ls.main([str(tmp_path / "Tiny-FP16")]) == 0
    assert capsys.readouterr().out == "records: none\nunfinished: none\n"
