import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import bench
from bench.cli import main, parser, scenarios_from
from bench.compare import main as compare
from bench.records.record import Record
from bench.records.scenario import SCENARIOS, Scenario
from bench.records.stopping import RoundsRule
from bench.records.store import read_records, write
from bench.run.executor import Executor
from bench.run.probe import Machine
from bench.run.run import Instruments
from bench.worker.request import PlannedRun, Settings
from quantable.cli import bench as whole
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError

Make = Callable[..., Checkpoint]
MakeRecords = Callable[..., list[Record]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(make_checkpoint: Make) -> Path:
    make_checkpoint("bnb-4bit", name="B")
    return make_checkpoint("fp16", name="A").path.parent


@pytest.fixture
def failing() -> dict[str, str]:
    """Statuses of the checkpoints that fail; "interrupt" presses Ctrl-C."""
    return {}


@pytest.fixture(autouse=True)
def fake_runs(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, records_of: MakeRecords, failing: dict[str, str]
) -> None:
    """The command calls `bench` on a fake machine with runs that measure nothing."""

    def run(planned: PlannedRun) -> list[Record]:
        status = failing.get(planned.subject.name, "ok")
        if status == "interrupt":
            raise KeyboardInterrupt
        return records_of(planned, status=status, reason=None if status == "ok" else "no memory left")

    def executor_for(settings: Settings, path: Path) -> Executor:
        return run

    faked = partial(Instruments, lambda device, threads: machine, executor_for, check_models=lambda *_: None)
    monkeypatch.setattr("bench.run.run.Instruments", faked)


def test_it_ends_with_where_the_records_are_and_how_to_make_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "3 rounds: every ratio is known well enough (--noise)",
        f"14 records: {folder / 'records.jsonl'}",
        f"the table: report {folder}",
    ]
    first, *rows = err.splitlines()
    assert first == f"bench: 2 checkpoints, into {folder / 'records.jsonl'}"
    assert len(rows) == 14
    assert main([str(folder)]) == 0
    assert "\n14 records (14 of them measured before): " in capsys.readouterr().out


def test_the_installed_command_ends_with_the_short_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Fastest in" in said or "No variant is surely faster" in said
    assert said.splitlines()[-1] == f"the table: report {folder}"
    assert whole([str(folder), "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_failed_rows_are_counted_with_their_reason_and_the_code_is_1(
    folder: Path, failing: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["B"] = "oom"
    assert main([str(folder), "--rounds", "1"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "B: oom: no memory left (3 runs)",
        "1 round: as many as are ever made",
        f"6 records, 3 failed: {folder / 'records.jsonl'}",
        f"the table: report {folder}",
    ]


def test_a_torn_line_is_told_and_what_it_held_is_measured_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--rounds", "1"]) == 0
    path = folder / "records.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join([before[0][:300], *before[1:]]) + "\n")
    capsys.readouterr()
    assert main([str(folder), "--rounds", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "records.jsonl is torn in line 1: a run that was being written there is lost" in out
    assert len(read_records(path)) == len(before)


def test_without_figures_of_the_reference_the_code_is_1_and_it_is_said(
    folder: Path, failing: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["A"] = "error"
    assert main([str(folder), "--rounds", "1"]) == 1
    out, err = capsys.readouterr()
    assert "A: error: no memory left (3 runs)" in out
    assert err.endswith("\nthe reference has no figures, so that nothing can be compared: see its reason above\n")


def test_ctrl_c_is_one_line_and_keeps_what_is_finished(
    folder: Path, failing: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["B"] = "interrupt"
    assert main([str(folder)]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\ninterrupted: what is finished is kept, the same bench again goes on\n")
    assert [record.subject.name for record in read_records(folder / "records.jsonl")] == ["A", "A", "A"]


def test_the_options_reach_the_bench(folder: Path, tmp_path: Path) -> None:
    records = tmp_path / "r.jsonl"
    options = [
        "--prompt",
        "10",
        "--new",
        "3",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--max-time",
        "0",
        "--dtype",
        "float32",
        "--no-quality",
    ]
    assert main([str(folder), *options, "--records", str(records)]) == 0
    found = read_records(records)
    assert [record.scenario for record in found] == [Scenario("10/3 x2", 10, 3, batch=2)] * 2
    assert main([str(folder), *options, "--records", str(records), "--fresh"]) == 0
    assert len(read_records(records)) == 2
    assert len(read_records(tmp_path / "r.1.jsonl")) == 2


@pytest.mark.parametrize(
    ("options", "scenarios"),
    [
        ([], list(SCENARIOS.values())),
        (["--scenario", "chat"], [SCENARIOS["chat"]]),
        (["--scenario", "chat", "--scenario", "chat"], [SCENARIOS["chat"]]),
        (["--prompt", "100"], [Scenario("100/1", 100, 1)]),
        (["--scenario", "published", "--prompt", "7", "--new", "2"], [SCENARIOS["published"], Scenario("7/2", 7, 2)]),
    ],
)
def test_the_scenarios_asked_for(options: list[str], scenarios: list[Scenario]) -> None:
    assert scenarios_from(parser().parse_args(["DIR", *options])) == scenarios


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of error that the user sees; the code is 2 and nothing but the progress is printed."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("bench: "))
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, tmp_path / "none") == f"no such folder: {tmp_path / 'none'}"


def test_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no quantable checkpoint: make some with `quantize" in fails(capsys, tmp_path)


def test_no_reference(make_checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint("awq-gemm").path.parent
    assert fails(capsys, folder) == (
        f"{folder} holds no reference of Tiny: make it with `quantize models/Tiny --variant fp16 --out {folder}`"
    )


def test_a_tampered_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "A" / "model.safetensors").write_bytes(b"")
    assert fails(capsys, folder) == (
        f"{folder / 'A' / 'model.safetensors'} has 0 bytes instead of 1: "
        "make the checkpoint again with `quantize --force`"
    )


def test_a_damaged_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "A" / "quantable.json").write_text("{")
    assert "quantable.json is damaged" in fails(capsys, folder)


def test_an_unknown_scenario(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, folder, "--scenario", "fast") == "unknown scenario 'fast'; there are: published, chat"


@pytest.mark.parametrize(("option", "value"), [("--new", 3), ("--batch", 3), ("--mode", "compiled")])
def test_half_a_scenario(folder: Path, option: str, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    message = "--new, --batch and --mode need --prompt: they make a scenario of your own"
    assert fails(capsys, folder, option, value) == message


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--rounds", 0, "at least 1"), ("--noise", 0, "above 0"), ("--max-time", "nan", "at least 0 seconds")],
)
def test_a_rule_out_of_range_names_its_option(
    folder: Path, flag: str, value: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, folder, flag, value) == f"{flag} must be {message}"


def test_the_package_has_the_function_and_nothing_it_does_not_know() -> None:
    from bench.run.run import bench as function

    assert bench.bench is function
    with pytest.raises(AttributeError, match="module 'bench' has no attribute 'speed'"):
        bench.speed  # noqa: B018


def test_an_empty_scenario(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, folder, "--prompt", 0) == "scenario 0/1: prompt_tokens must be at least 1"
    assert fails(capsys, folder, "--prompt", 5, "--new", 0) == "scenario 5/0: new_tokens must be at least 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_cuda(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.run.run.Instruments", partial(Instruments, check_models=lambda *_: None))
    message = "no CUDA device here: use --device cpu, or install the driver and a torch made for CUDA"
    assert fails(capsys, folder, "--device", "cuda") == message


def test_a_bug_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("bench.run.run.bench", broken)
    with pytest.raises(ZeroDivisionError):
        main([str(folder)])


def test_python_m_bench_is_the_command(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bench", str(tmp_path / "none")],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: no such folder: {tmp_path / 'none'}\n"


def test_user_errors_only(folder: Path) -> None:
    with pytest.raises(UserError):
        RoundsRule(least=0)


def test_two_record_files_are_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for file in files:
        assert main([str(folder), "--records", str(file)]) == 0
    capsys.readouterr()
    assert compare([*map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "A, chat, decode, cpu, float32: x1.00 (1.00 to 1.00), same within noise" in lines
    assert "independent series, and what the machine did in between is in the ratio" in lines[-1]
    changed = [
        replace(record, environment=replace(record.environment, cpu="Model 2")) for record in read_records(files[1])
    ]
    write(files[1], changed)
    assert compare([*map(str, files)]) == 0
    assert "two machines (cpu: Model 1 against Model 2)" in capsys.readouterr().out
    changed = [replace(record, compute_dtype="bfloat16") for record in read_records(files[0])]
    write(files[1], changed)
    assert compare([*map(str, files)]) == 2
    assert "(compute_dtype: float32 against bfloat16)" in capsys.readouterr().err


def test_no_folder_and_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys) == "name the folder of the checkpoints: bench DIR"


def test_json_is_one_object_and_quiet_leaves_the_hints_out(
    folder: Path, failing: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["B"] = "oom"
    assert main([str(folder), "--rounds", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    failed = {"name": "B", "status": "oom", "reason": "no memory left"}
    assert json.loads(out) == {
        "records": str(folder / "records.jsonl"), "measured": 6, "total": 6, "rounds": 1, "stopped": "rounds",
        "usable": True, "broken": {}, "failed": [failed | {"kind": kind} for kind in ("latency", "latency", "quality")],
    }  # fmt: skip
    assert err.startswith("bench: 2 checkpoints, into ")
    assert main([str(folder), "--rounds", "1", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("6 records")
    assert err == ""
