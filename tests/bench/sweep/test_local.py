"""A sweep on this machine: which devices its processes see, how they end, and what a kill leaves."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.records.store import read_records
from bench.run.plan import key_of
from bench.sweep import local
from bench.sweep.cell import Attempt, Cell, cells_from, contents_of
from bench.sweep.cli import main
from tests.bench.sweep.conftest import SMALL, break_weights

ROOT = Path(__file__).parents[3]
DEADLINE_S = 300.0

WORKER = """
import os, sys, time, pathlib
out, name, parent = sys.argv[1:]
log = pathlib.Path(out) / "seen"
with log.open("a") as file:
    print(name, os.environ["CUDA_VISIBLE_DEVICES"], file=file, flush=True)
if name == "slow":
    time.sleep(600)
while name == "One" and "Three" not in log.read_text():  # the other device takes two meanwhile
    time.sleep(0.01)
sys.exit(name == "bad")
"""


def run(
    out: Path, names: list[str], places: list[str], monkeypatch: pytest.MonkeyPatch, timeout_s: float = 60
) -> list[Attempt]:
    monkeypatch.setattr(local, "WORKER", ("-c", WORKER))
    cells: tuple[Cell, ...] = cells_from([f"org/{name}" for name in names], ["fp16"], False, ((), ()))
    told: list[Attempt] = []
    local.run_local(out, cells, places, timeout_s, told.append)
    return told


def test_each_gpu_has_one_process_which_sees_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run(tmp_path, ["One", "Two", "Three", "Four"], ["0", "1"], monkeypatch)
    seen = dict(line.split() for line in (tmp_path / "seen").read_text().splitlines())
    assert (seen["One"], seen["Two"], seen["Three"]) == ("0", "1", "1")
    assert len(told) == 4


def test_one_that_dies_or_takes_too_long_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.reason for one in run(tmp_path, ["bad"], [""], monkeypatch)] == [
        "the process ended with code 1 and no record: it said nothing"
    ]
    assert [one.reason for one in run(tmp_path, ["slow"], [""], monkeypatch, 0.6)] == [
        "took longer than 0.6 s (see --timeout)"
    ]


@pytest.mark.parametrize(
    ("visible", "wanted", "found"), [("2,5", "auto", ["2", "5"]), ("-1", "cuda", [""]), ("3", "cpu", [""])]
)
def test_the_devices_are_those_that_this_process_sees(
    visible: str, wanted: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.devices(wanted) == found


def records_in(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/records.jsonl"))


@pytest.mark.slow
def test_killed_at_random_moments_it_keeps_what_is_finished_and_measures_nothing_twice(
    tiny_models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moments = tmp_path / "out", random.Random()
    command = [sys.executable, "-m", "quantable", "sweep", *map(str, tiny_models), "--out", str(out), *SMALL]
    whole = len(tiny_models) * 2 * 2  # variants, rounds
    done: dict[Path, bytes] = {}
    for records in sorted(moments.sample(range(whole - 1), 5)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_S
        while records_in(out) < records:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.random())  # in the middle of the next
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for model in tiny_models:
            attempts = [json.loads(path.read_text()) for path in (out / model.name / "attempts").glob("*.json")]
            if any(one["state"] == "done" for one in attempts):
                path = out / model.name / "records.jsonl"
                assert done.setdefault(path, path.read_bytes()) == path.read_bytes()
    assert main([*command[4:]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 done"
    assert all(path.read_bytes() == content for path, content in done.items())
    for model in tiny_models:
        found = read_records(out / model.name / "records.jsonl")
        assert {record.status for record in found} == {"ok"}
        assert set(Counter(map(key_of, found)).values()) == {1}
        assert len(found) == 4
    before = {path: path.read_bytes() for path in out.glob("*/records.jsonl")}
    assert main([*command[4:]]) == 0  # and once more, with nothing to do
    assert {path: path.read_bytes() for path in out.glob("*/records.jsonl")} == before


@pytest.mark.slow
def test_a_broken_model_is_a_row_and_goes_well_when_it_is_mended(
    tiny_models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = tiny_models[:2]
    whole = (broken / "model.safetensors").read_bytes()
    break_weights(broken)
    words = [str(broken), str(good), "--out", str(tmp_path / "out"), *SMALL]
    assert main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "model.safetensors is damaged or cut short" in lines[0]
    assert (lines[1].startswith("model-0: done in "), lines[2]) == (True, "1 done, 1 failed")
    assert main(["--status", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.splitlines() == lines
    (broken / "model.safetensors").write_bytes(whole)
    assert main(words) == 0
    assert len(contents_of(tmp_path / "out" / "model-1")) == 2


SUITE = """
shape = "{shape}"
reference = {{base_model = "A"}}
rounds = {{least = 1, most = 1}}
rule = {{max_warmups = 2, min_passes = 2, min_time_s = 0.01, max_time_s = 0.1}}
scenario = [{{name = "short", prompt_tokens = 8, new_tokens = 1}}]
row = [
  {{base_model = "A", source = "org/A", variant = "fp16"}},
  {{base_model = "B", source = "org/B", variant = "awq-gemm", group_size = 64}},
]
"""


@pytest.mark.slow
def test_a_suite_is_swept_by_its_scenarios_each_model_beside_a_reference_of_its_own(
    shrunken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, out = tmp_path / "two.toml", tmp_path / "out"
    suite.write_text(SUITE.format(shape=shrunken))
    words = [str(suite), "--out", str(out), "--device", "cpu", "--bench", "--dummy --threads 1"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 done"
    found = {name: read_records(out / name / "records.jsonl") for name in ("A", "B")}
    assert [one.subject.variant for one in found["A"]] == ["fp16"]
    assert sorted(one.subject.variant for one in found["B"]) == ["awq-gemm", "fp16"]
    assert {one.subject.base_model for one in found["B"]} == {"B"}
    assert {one.scenario and one.scenario.name for one in found["B"]} == {"short"}
