"""The comparison with optimum-benchmark, without it: its lists of times, its launcher and a table made by hand."""

import ast
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.records.store import write
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError
from tests.lab import optimum_benchmark
from tests.lab.optimum_benchmark import ASLEEP, OURS, THEIRS
from tests.lab.pages import lab_page
from tests.lab.records import SideBySideRecord, read_lab

MakeCheckpoint = Callable[..., Checkpoint]

STUB = """
import time
from multiprocessing import Pipe, Process, set_start_method

def latency(*values):
    return {"values": list(values), "p50": 1.0, "mean": 1.0, "count": len(values)}

def config(**given):
    return given

InferenceConfig = PyTorchConfig = BenchmarkConfig = config

def ProcessConfig():
    return "process"

class Report:
    def to_dict(self):
        return {
            "prefill": {"latency": latency(1.0)},
            "per_token": {"latency": latency(0.5, 0.25)},
            "load_model": {"latency": None},
        }

def measure(connection):
    time.sleep(0.5)
    connection.send(0)

class Benchmark:
    @staticmethod
    def launch(config):
        set_start_method("spawn", force=True)
        theirs, ours = Pipe()
        process = Process(target=measure, args=(theirs,))
        process.start()
        while process.is_alive() and not ours.poll():
            pass
        return Report()
"""
"""As much of optimum-benchmark 0.6.0 as PROGRAM touches, its launcher's way of waiting included."""

ASKED = {"prompt": 8, "new": 3, "iterations": 1, "duration_s": 0, "seed": 0}


def their_list(times: list[list[float]]) -> list[float]:
    """What its tracker makes of the times at which each pass had its tokens."""
    events: list[float] = []
    gaps: list[float] = []
    for one in times:
        events += one
        gaps += [end - start for start, end in itertools.pairwise(events)]
    return gaps


def test_steps_once_each_out_of_their_list() -> None:
    times = [[0.0, 1.0, 3.0], [100.0, 104.0, 109.0], [200.0, 206.0, 213.0]]
    values = their_list(times)
    assert len(values) == 2 + 5 + 8
    assert optimum_benchmark.steps_of(values, passes=3, new=3) == ((1.0, 2.0), (4.0, 5.0), (6.0, 7.0))


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 per-token values for 2 passes of 3 tokens"):
        optimum_benchmark.steps_of([1.0] * 5, passes=2, new=3)


def test_only_a_half_precision_checkpoint_is_measured(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint("bnb-8bit").path
    options = ["--theirs", str(tmp_path / "python"), "--out", str(tmp_path), "--model"]
    assert optimum_benchmark.main([*options, str(model)]) == 2
    assert "is quantized: give --model the checkpoint of --variant fp16" in capsys.readouterr().err
    for bad in (["--prompt", "0"], ["--new", "1"], ["--iterations", "0"], ["--duration", "-1"], ["--rounds", "0"]):
        assert optimum_benchmark.main([*options, str(model), *bad]) == 2
        assert "must be at least 1, --new 2 and --duration 0" in capsys.readouterr().err


def test_an_older_transformers_finds_the_rope_base(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("fp16")
    (checkpoint.path / "config.json").write_text('{"rope_parameters": {"rope_theta": 5.0}}')
    copy = optimum_benchmark.readable_copy(checkpoint, tmp_path / "copy")
    assert json.loads((copy / "config.json").read_text())["rope_theta"] == 5.0
    assert (copy / "model.safetensors").read_bytes() == b"w"


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--theirs", str(tmp_path / "python"), "--model", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert optimum_benchmark.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: no such folder")
    with pytest.raises(UserError, match="no interpreter"):
        optimum_benchmark.interpreter(str(tmp_path / "python"))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An interpreter that finds the stub."""
    package = tmp_path / "theirs" / "optimum_benchmark"
    for module in ("backends/pytorch/backend", "scenarios/inference/scenario", "launchers/process/launcher"):
        (package / module).parent.mkdir(parents=True)
        (package / f"{module}.py").touch()
    (package / "__init__.py").write_text(STUB)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_asleep_the_launcher_waits_without_using_the_processor(theirs: Path, tmp_path: Path) -> None:
    used = {}
    for asleep in (False, True):
        request = {"model": os.fspath(tmp_path), **ASKED, "asleep": asleep}
        wall_s, result = optimum_benchmark.run_inside(theirs, request)
        assert isinstance(result, dict), result
        assert wall_s > 0
        assert result["latency"]["prefill"] == {"values": [1.0], "p50": 1.0, "mean": 1.0, "count": 1}
        assert set(result["latency"]) == {"prefill", "per_token"}
        used[asleep] = result["launcher_cpu_s"]
    assert used[True] < used[False]


def test_all_contenders_run_every_other_round_backwards(theirs: Path, tiny_reference: Path, tmp_path: Path) -> None:
    """Our real bench, and the stub in the place of optimum-benchmark."""
    options = ["--prompt", "8", "--new", "3", "--iterations", "1", "--duration", "0", "--rounds", "2"]
    command = ["--theirs", str(theirs), "--model", str(tiny_reference), "--out", str(tmp_path / "out"), *options]
    assert optimum_benchmark.main(command) == 0
    path = tmp_path / "out" / "side_by_side.jsonl"
    ran = read_lab(path, SideBySideRecord)
    assert [one.contender for one in ran] == [OURS, THEIRS, ASLEEP, ASLEEP, THEIRS, OURS]
    assert [(one.round, one.reason) for one in ran] == [(number, None) for number in (0, 0, 0, 1, 1, 1)]
    ours, stub, asleep = ran[:3]
    assert all(len(steps) == 2 for steps in ours.decode_s)
    assert len(ours.prefill_s) == len(ours.decode_s) > 0
    assert stub.prefill_s == asleep.prefill_s == (1.0,)
    assert stub.decode_s == asleep.decode_s == ((0.5, 0.25),)
    assert "within 5% of optimum-benchmark" in lab_page(path)
    write(path, [replace(ours, round=6)])
    assert optimum_benchmark.main([*command, "--rounds", "1"]) == 0
    assert [one.round for one in read_lab(path, SideBySideRecord)] == [6, 7, 7, 7]


def test_a_contender_without_figures_fails_the_comparison(theirs: Path, tmp_path: Path) -> None:
    """The stub has two steps a pass, not three."""
    asked = {"model": os.fspath(tmp_path), **ASKED, "new": 4, "asleep": True}
    outcome = optimum_benchmark.run_theirs(theirs, asked)
    assert outcome["reason"] == "2 per-token values for 1 passes of 4 tokens: another version?"
    assert outcome["prefill_s"] == (1.0,)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no python here\nexit 1\n")
    broken.chmod(0o755)
    outcome = optimum_benchmark.run_theirs(broken, asked)
    assert outcome["reason"] == "the process ended with code 1 and no record: no python here"


def test_the_libraries_are_those_of_the_interpreter_that_measures(theirs: Path) -> None:
    _, found = optimum_benchmark.interpreter(str(theirs))
    assert found["libraries"]["torch"]
    assert found["torch_threads"] >= 1
    with pytest.raises(UserError, match=r"cannot import optimum-benchmark .*No module named 'optimum_benchmark'"):
        optimum_benchmark.interpreter(sys.executable)


def test_the_program_needs_none_of_our_packages() -> None:
    program = ast.walk(ast.parse(optimum_benchmark.PROGRAM.read_text()))
    names = {node.module for node in program if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if str(name).split(".")[0] in ("bench", "quantize", "reports")}
