"""What a sweep's cells are, and how each stands by what attempts left."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.sweep.cell import Attempt, Cell, cells_from, read_cells, standing
from bench.sweep.cli import main
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError

NO_OPTIONS = ((), ())
NOBODY = 2**22  # no process has this number


def cells(*names: str, merge: bool = False) -> tuple[Cell, ...]:
    return cells_from(names, ["awq-gemm", "bnb-8bit"], merge, NO_OPTIONS)


def test_a_model_is_a_cell_with_its_reference(tmp_path: Path) -> None:
    found = cells("org/One", str(tmp_path), "dummy:mistral-7b", "merge:BioMistral-7B-TIES", "merge:a/two.yaml")
    assert [one.name for one in found] == ["One", tmp_path.name, "mistral-7b", "BioMistral-7B-TIES", "two"]
    assert found[0].calls[0].variants == ("fp16", "awq-gemm", "bnb-8bit")
    with pytest.raises(UserError, match="two models of the sweep are called One: sweep them into two folders"):
        cells("org/One", "other/One")


def test_a_suite_is_a_cell_a_base_model_each_with_a_reference_of_its_own() -> None:
    found = cells("biomistral")
    assert [one.name for one in found] == ["BioMistral-7B", *(f"BioMistral-7B-{m}" for m in ("DARE", "TIES", "SLERP"))]
    assert [call.variants for call in found[1].calls] == [("fp16", "awq-gemm")]
    assert {one.suite for one in found} == {"biomistral"}
    assert cells("biomistral", merge=True)[3].calls[0].source == "merge:BioMistral-7B-SLERP"


def test_another_cell_is_one_of_other_weights_options_or_variants(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = cells(str(tmp_path))[0]
    assert cells(str(tmp_path))[0].key == first.key
    assert cells_from([str(tmp_path)], ["all"], False, NO_OPTIONS)[0].key != first.key
    assert replace(first, options=(("--blocks", "2"), ())).key != first.key
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert cells(str(tmp_path))[0].key != first.key


@pytest.fixture
def cell(make_checkpoint: Callable[..., Checkpoint]) -> Cell:
    """A cell whose folder, tmp_path/models, holds a checkpoint and records."""
    made = make_checkpoint("fp16").path.parent
    (made / "records.jsonl").touch()
    return replace(cells("org/One")[0], name="models")


def stands(cell: Cell, out: Path, *attempts: Attempt, **queued: str) -> tuple[str, str]:
    for one in attempts:
        replace(one, started=1e9 + float(len(list(out.glob("models/attempts/*"))))).write(out)
    found = standing(out, cell, {name.removeprefix("job"): state for name, state in queued.items()})
    return found.state, found.reason


def test_done_is_what_ended_well_with_the_checkpoints_that_are_there(cell: Cell, tmp_path: Path) -> None:
    assert stands(cell, tmp_path) == ("waiting", "")
    checkpoint = next((tmp_path / "models").glob("*/quantable.json")).parent
    from bench.sweep.cell import contents_of

    done = Attempt("models", cell.key, "done", contents=contents_of(tmp_path / "models"))
    assert stands(cell, tmp_path, done) == ("done", "")
    assert stands(cell, tmp_path, done, Attempt("models", cell.key, "failed", "why")) == ("done", "")  # a second copy
    assert stands(replace(cell, suite="other"), tmp_path) == ("waiting", "")
    manifest = json.loads((checkpoint / "quantable.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    (checkpoint / "quantable.json").write_text(json.dumps(manifest))
    assert stands(cell, tmp_path) == ("waiting", "its checkpoints or records are not what was measured")


def test_what_runs_waits_or_ended_without_a_word(cell: Cell, tmp_path: Path) -> None:
    running = Attempt("models", cell.key, "running", process=os.getpid())
    assert stands(cell, tmp_path, running)[0] == "running"
    dead = replace(running, process=NOBODY)
    assert stands(cell, tmp_path, dead)[0] == "failed"
    queued = Attempt("models", cell.key, "waiting", job="7_0")
    assert stands(cell, tmp_path, queued, **{"7_0": "PENDING"}) == ("waiting", "Slurm says pending")
    assert stands(cell, tmp_path, queued, **{"7_0": "RUNNING"}) == ("running", "Slurm says running")
    gone = ("failed", "Slurm job 7_0 is gone without a word; the same sweep again goes on")
    assert stands(cell, tmp_path, queued) == gone
    assert standing(tmp_path, cell).state == "waiting"  # which Slurm was not asked about
    started = replace(dead, job="7_0")
    assert stands(cell, tmp_path, queued, started, **{"7_0": "PENDING"})[0] == "waiting"  # queued again
    assert stands(cell, tmp_path, queued, started) == gone
    failed = replace(started, state="failed", reason="why")
    assert stands(cell, tmp_path, queued, failed, **{"7_0": "COMPLETING"}) == ("failed", "why")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no sweep: begin one with `quantable sweep MODELS --out"),
        (["--status"], "holds no sweep"),
        (["org/One", "--timeout", "0"], "--timeout must be more than 0 minutes"),
        (["org/One", "--slurm", "mem"], "--slurm be NAME=VALUE"),
        (["org/One", "--variant", "awq"], "unknown variant 'awq'"),
        (["org/One", "--bench=--speed"], "unrecognized arguments: --speed: `bench --help` lists"),
        (["smollm2.toml"], "no suite 'smollm2.toml'"),
        (["qwen2-7b", "--merge"], "qwen2-7b has no row with a recipe"),
    ],
)
def test_nonsense_is_one_line_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*words, "--out", str(tmp_path / "out")])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    err = capsys.readouterr().err
    assert (code, err.count("\n"), message in err) == (2, 1, True), err
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_without_slurm_or_submitit_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["org/One", "--on", "slurm", "--out", str(tmp_path)]) == 2
    assert "--on slurm needs submitit: pip install 'quantable[slurm]'" in capsys.readouterr().err
    cell = read_cells(tmp_path)[0]
    Attempt(cell.name, cell.key, "waiting", job="7").write(tmp_path)
    assert main(["--status", "--out", str(tmp_path)]) == 2
    assert "squeue does not answer" in capsys.readouterr().err
