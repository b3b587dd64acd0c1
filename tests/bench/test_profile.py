"""Where time goes: the operations of a real model on a CPU, and how they are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import profile
from bench.profile import profile_of
from bench.records.profile import ProfileRecord
from bench.records.store import read_only
from bench.worker.clock import Clock
from tests.quantize.loading.test_dummy_model import CONFIG


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "shape" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG))
    return f"dummy:{path}"


def test_the_operations_of_a_pass_are_counted_and_add_up() -> None:
    a = torch.randn(700, 700)
    wall_s, operations = profile_of(lambda: (a @ a, a @ a, a + 1), "cpu", Clock())
    calls = {one.name: one.calls for one in operations}
    assert calls["aten::mm"] == 2
    assert calls["aten::add"] == 1
    assert operations[0].name == "aten::mm"
    assert wall_s > 0
    assert [one.seconds for one in operations] == sorted((one.seconds for one in operations), reverse=True)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_model_is_profiled_and_recorded(
    source: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "profile.jsonl"
    asked = [source, "--variant", "awq-gemm", "--kernel", "dequantize", "--mode", mode, "--prompt", "40"]
    assert profile.main([*asked, "--out", str(out)]) == 0
    prefill, decode = read_only(out, ProfileRecord)
    assert (prefill.phase, prefill.variant) == ("prefill", "awq-gemm")
    assert decode.phase == f"decode step, {'eager' if mode == 'eager' else 'static cache'}"
    assert decode.kernels.decode == "dequantize + matmul (float32)"
    calls = {one.name: one.calls for one in decode.operations}
    assert calls["aten::mm"] == 7 * 2 + 1  # the products of two layers, and the output head
    assert capsys.readouterr().out == f"the operations: report {out}\n"
    assert profile.main([*asked, "--out", str(out)]) == 0
    assert len(read_only(out, ProfileRecord)) == 4


def test_what_cannot_be_profiled_is_one_line(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "profile.jsonl")]
    assert profile.main([source, *out]) == 2
    assert profile.main([str(tmp_path), "--variant", "awq-gemm", *out]) == 2
    assert profile.main([str(tmp_path), *out]) == 2
    asked = [source, "--variant", "fp16", "--prompt"]
    assert profile.main([*asked, "600", *out]) == 2
    assert profile.main([*asked, "8", "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert "needs 614 positions, the model has 512: use a smaller --prompt" in lines[3]
    assert lines[4].endswith("(Is a directory): choose another place")
    assert "needs a --variant: fp16, " in lines[0]
    assert "give --variant for a dummy:SHAPE alone" in lines[1]
    assert not (tmp_path / "profile.jsonl").exists()


def test_torchs_profiler_prints_nothing(source: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.profile", source, "--variant", "fp16", "--prompt", "8"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "profile.jsonl")], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
    assert ran.stdout.startswith("the operations: ")
