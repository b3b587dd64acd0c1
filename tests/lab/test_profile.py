"""Where time goes: the operations of a real model on a CPU, and how they are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.records.environment import Environment
from bench.records.record import Kernels
from bench.records.scenario import Scenario
from bench.records.store import append
from bench.worker.clock import Clock
from tests.lab import profile
from tests.lab.pages import NAME_CHARACTERS, SHOWN_OPERATIONS, lab_page
from tests.lab.profile import profile_of
from tests.lab.records import Operation, ProfileRecord, read_lab
from tests.quantize.loading.test_dummy_model import CONFIG

FEW = (Operation("gemm", 2.0, 0.003), Operation("norm", 4.0, 0.001))


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
    prefill, decode = read_lab(out, ProfileRecord)
    assert (prefill.phase, prefill.variant) == ("prefill", "awq-gemm")
    assert decode.phase == f"decode step, {'eager' if mode == 'eager' else 'static cache'}"
    assert decode.kernels.decode == "dequantize + matmul (float32)"
    calls = {one.name: one.calls for one in decode.operations}
    assert calls["aten::mm"] == 4 * 2 + 1  # the products of two layers, inputs shared, and the output head
    assert capsys.readouterr().out == f"the operations: python -m tests.lab.pages {out}\n"
    assert profile.main([*asked, "--out", str(out)]) == 0
    assert len(read_lab(out, ProfileRecord)) == 4


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
    command = [sys.executable, "-m", "tests.lab.profile", source, "--variant", "fp16", "--prompt", "8"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "profile.jsonl")], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
    assert ran.stdout.startswith("the operations: ")


def profiled(operations: tuple[Operation, ...], wall_s: float, variant: str | None = None) -> ProfileRecord:
    about = Scenario("profile", 128, 65), Kernels("a", "b"), Environment(cpu="Epyc 9")
    return ProfileRecord("2026", "Tiny", variant, *about, "prefill", wall_s, operations)


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of a page's tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def test_a_profile_has_its_longest_operations_and_the_rest_in_one_row(tmp_path: Path) -> None:
    many = tuple(Operation(f"kernel {number}" + "<T>" * 99, 2.0, 0.001) for number in range(SHOWN_OPERATIONS + 3))
    append(tmp_path / "profile.jsonl", profiled(many, 0.02))
    text = lab_page(tmp_path / "profile.jsonl")
    assert "Tiny, prefill: 20.00 ms, of which busy 15.00 ms, on Epyc 9." in text
    rows = rows_of(text)
    assert len(rows) == SHOWN_OPERATIONS + 1
    assert rows[0][:3] == ["1.00", "6.7%", "2"]
    assert rows[0][3].replace("\\", "") == f"kernel 0{'<T>' * 99}"[:NAME_CHARACTERS]
    assert rows[-1] == ["3.00", "20.0%", "6", "3 others"]


def test_a_profile_of_few_operations_has_a_row_for_each(tmp_path: Path) -> None:
    append(tmp_path / "profile.jsonl", profiled(FEW, 0.004, "fp16"))
    text = lab_page(tmp_path / "profile.jsonl")
    assert "Tiny, fp16, prefill: 4.00 ms" in text
    assert [row[3] for row in rows_of(text)] == ["gemm", "norm"]


def test_the_gallerys_profiles_are_read() -> None:
    path = Path(__file__).resolve().parents[2] / "reports/gallery/h200-mistral-7b/profile.jsonl"
    assert {one.phase for one in read_lab(path, ProfileRecord)} >= {"prefill"}
    assert "NVIDIA H200" in lab_page(path)
