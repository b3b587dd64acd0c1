"""The comparison with optimum-benchmark, without it: its lists of times, its launcher and a table made by hand."""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.lab import optimum_benchmark
from bench.lab.optimum_benchmark import ASLEEP, CONTENDERS, OURS, THEIRS, WORKS, Run
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError

MakeCheckpoint = Callable[..., Checkpoint]

STUB = """
import time
from multiprocessing import Pipe, Process, set_start_method

LATENCY = {"values": [1.0], "p50": 1.0, "mean": 1.0, "count": 1}

def config(**given):
    return given

InferenceConfig = PyTorchConfig = BenchmarkConfig = config

def ProcessConfig():
    return "process"

def InlineConfig():
    return "inline"

class Report:
    def to_dict(self):
        return {"prefill": {"latency": LATENCY}, "load_model": {"latency": None}}

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
"""As much of optimum-benchmark 0.6.0 as `launched` touches, its launcher's way of waiting included."""


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


def test_a_list_without_repeats_is_taken_as_it_is() -> None:
    assert optimum_benchmark.steps_of([1.0, 2.0, 3.0, 4.0], passes=2, new=3) == ((1.0, 2.0), (3.0, 4.0))


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 per-token values for 2 passes of 3 tokens"):
        optimum_benchmark.steps_of([1.0] * 5, passes=2, new=3)


def test_every_other_round_runs_backwards() -> None:
    assert optimum_benchmark.order(CONTENDERS, 0) == [OURS, THEIRS, ASLEEP]
    assert optimum_benchmark.order(CONTENDERS, 1) == [ASLEEP, THEIRS, OURS]


def runs_of(name: str, prefill_s: float, decode_s: float, wall_s: float) -> list[Run]:
    latency = {"per_token": {"p50": decode_s, "mean": decode_s, "count": 2}}
    raw = {} if name == OURS.name else {"launcher_cpu_s": wall_s, "latency": latency}
    return [Run(name, number, wall_s, (prefill_s,), ((decode_s, decode_s),), raw) for number in range(2)]


def test_table_and_findings() -> None:
    runs = runs_of(OURS.name, 0.5, 0.04, 10.0) + runs_of(THEIRS.name, 1.0, 0.16, 40.0)
    runs += runs_of(ASLEEP.name, 0.51, 0.04, 16.0)
    heading, ours, theirs, asleep = optimum_benchmark.table(runs)
    assert "ours / it" in heading
    assert ours.split() == ["quantable", "0.5000", "0.0400", "10.0000"]
    assert "0.500 (0.50-0.50)" in theirs
    assert "0.250 (0.25-0.25)" in theirs
    assert "wait asleep" in asleep
    said = optimum_benchmark.findings(runs)
    assert "prefill: not within 5% of optimum-benchmark (0.500)" in said
    assert "prefill: within 5% of optimum-benchmark, wait asleep (0.980)" in said
    assert "wall: at most 0.5 of optimum-benchmark (0.250)" in said
    assert "wall: not at most 0.5 of optimum-benchmark, wait asleep (0.625)" in said


def test_a_contender_without_figures_says_why() -> None:
    runs = [*runs_of(OURS.name, 0.5, 0.04, 10.0), Run(THEIRS.name, 0, 3.0, reason="no such luck")]
    assert optimum_benchmark.table(runs)[-1].endswith("could not run: no such luck")
    assert optimum_benchmark.findings(runs) == []


def test_the_reference_is_found_or_asked_for(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    make_checkpoint("bnb-8bit")
    with pytest.raises(UserError, match="holds no half-precision checkpoint"):
        optimum_benchmark.reference_in(tmp_path / "models")
    one = make_checkpoint("fp16")
    assert optimum_benchmark.reference_in(tmp_path / "models") == one
    assert optimum_benchmark.reference_in(one.path) == one
    make_checkpoint("fp16", base_model="Other")
    with pytest.raises(UserError, match="several half-precision checkpoints"):
        optimum_benchmark.reference_in(tmp_path / "models")


def test_an_older_transformers_finds_the_rope_base(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("fp16")
    (checkpoint.path / "config.json").write_text('{"rope_parameters": {"rope_theta": 5.0}}')
    copy = optimum_benchmark.readable_copy(checkpoint, tmp_path / "copy")
    assert json.loads((copy / "config.json").read_text())["rope_theta"] == 5.0
    assert (copy / "model.safetensors").read_bytes() == b"w"


@pytest.mark.parametrize("shape", [(0, 16, 3, 10), (256, 1, 3, 10), (256, 16, 0, 10), (256, 16, 3, -1)])
def test_impossible_shapes_are_refused(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="at least"):
        optimum_benchmark.Shape(*shape)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--theirs", str(tmp_path / "python"), "--model", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert optimum_benchmark.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: no such folder")
    with pytest.raises(UserError, match="no interpreter"):
        optimum_benchmark.interpreter(str(tmp_path / "python"))


def echo(request: dict[str, Any]) -> dict[str, Any]:
    import os

    if request["said"] == "fail":
        raise RuntimeError("no echo")
    return {"said": request["said"], "path": os.environ.get("PYTHONPATH")}


def test_another_interpreter_gets_the_work_and_not_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKS, "echo", echo)
    wall_s, result = optimum_benchmark.run_inside(sys.executable, "echo", {"said": "hello"})
    assert result == {"said": "hello", "path": None}
    assert wall_s > 0
    _, reason = optimum_benchmark.run_inside(sys.executable, "echo", {"said": "fail"})
    assert isinstance(reason, str)
    assert reason.endswith("RuntimeError: no echo")


def test_asleep_the_launcher_waits_without_using_the_processor(tmp_path: Path) -> None:
    (tmp_path / "optimum_benchmark.py").write_text(STUB)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    shape = optimum_benchmark.Shape(8, 2, 1, 0)
    used = {}
    for asleep in (False, True):
        request = {"model": os.fspath(tmp_path), **vars(shape), "launcher": "process", "asleep": asleep}
        _, result = optimum_benchmark.run_inside(python, "launched", request)
        assert isinstance(result, dict), result
        assert result["latency"] == {"prefill": {"values": [1.0], "p50": 1.0, "mean": 1.0, "count": 1}}
        used[asleep] = result["launcher_cpu_s"]
    assert used[True] < used[False]


@pytest.mark.parametrize("work", WORKS)
def test_scripts_are_programs(work: str) -> None:
    compile(optimum_benchmark.script_of(work), work, "exec")
