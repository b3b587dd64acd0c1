"""`bench --suite`: the whole published table in one command, rehearsed on a shrunken model on the CPU."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bench.cli import main
from bench.records.record import Record, read_records
from bench.records.stopping import Rounds
from bench.run.executor import Ended
from bench.run.probe import Machine
from bench.run.run import BenchOptions, measure
from bench.suite.suite import suite_named
from bench.suite.suite_run import Campaign, run_campaign
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError
from reports.api import load_records
from reports.published import BIOMISTRAL_7B
from reports.results import measurements
from reports.versus_published import versus_page

ROOT = Path(__file__).parents[3]
FILES = {
    "records.jsonl",
    "table.md",
    "published.md",
    "crossover.jsonl",
    "crossover.png",
    "crossover.svg",
    "records.log",
}
"""Everything that the command may write; the last one when something failed."""

MOST_FILES = 8
SCENARIOS = ["published", "chat", "chat-graph"]


def rehearse(out: Path, shape: Path, cache: Path) -> "subprocess.CompletedProcess[str]":
    """The command as a user types it, with one round and a short crossover."""
    command = [sys.executable, "-m", "bench", "--suite", "biomistral", "--dummy", "--shape", str(shape)]
    command += ["--device", "cpu", "--rounds", "1", "--max-time", "0", "--crossover-time", "2", "--out", str(out)]
    command += ["--dtype", "float32", "--threads", "1"]
    environment = {**os.environ, "QUANTABLE_CACHE": str(cache)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rehearsal(
    shrunken: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """The folder that the command filled, and what it said."""
    folder = tmp_path_factory.mktemp("campaign")
    return folder / "out", rehearse(folder / "out", shrunken, folder / "cache")


def test_the_command_measures_every_row_and_ends_well(
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    out, ran = rehearsal
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    records = read_records(out / "records.jsonl")
    suite = suite_named("biomistral")
    assert [(record.subject.base_model, record.subject.variant, record.subject.kernel) for record in records] == [
        (row.base_model, row.variant, row.kernel) for row in suite.rows for _ in SCENARIOS
    ]
    assert [record.scenario.name for record in records if record.scenario] == SCENARIOS * len(suite.rows)
    published = [record for record in records if record.subject.kernel is None]
    assert [(record.subject.name, record.reason) for record in published if record.status != "ok"] == []
    assert f"{len(records)} records" in ran.stdout
    assert str(ROOT) not in (out / "records.jsonl").read_text()


def test_it_writes_no_more_than_the_files_it_names(
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    out, ran = rehearsal
    written = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert written <= FILES
    assert len(written) <= MOST_FILES
    assert {"records.jsonl", "table.md", "published.md", "crossover.jsonl"} <= written, ran.stdout
    if importlib.util.find_spec("matplotlib"):
        assert {"crossover.png", "crossover.svg"} <= written, ran.stdout
    else:
        assert "no crossover.png: " in ran.stdout


def test_the_page_has_the_eight_rows_in_the_published_order(
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    out, _ = rehearsal
    lines = (out / "published.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    titles, _, *rows = cells
    assert titles[:6] == ["Base Model", "Method", "q_group_size", "w_bit", "version", "Published VRAM GB"]
    expected = [
        [row.base_model, row.method, *(str(one or "") for one in (row.q_group_size, row.w_bit, row.version))]
        for row in BIOMISTRAL_7B
    ]
    assert [row[:5] for row in rows[: len(expected)]] == expected
    time = titles.index("Measured Time")
    assert rows[0][time] == "x1.00"
    assert all(row[time].startswith("x") for row in rows[: len(expected)])


def test_a_rehearsal_does_not_pass_for_the_table(
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    out, _ = rehearsal
    page = " ".join((out / "published.md").read_text(encoding="utf-8").split())
    assert "random, in the shape shrunken, 2 layers, hidden size 256" in page
    assert "It is not the shape of the published models (32 layers, hidden size 4096)" in page
    [measurement] = measurements(load_records(out))
    table = versus_page([measurement])[0]
    quotients = [place for place, title in enumerate(table.titles) if "/ published" in title]  # type: ignore[union-attr]
    assert len(quotients) == 2
    assert {row[place] for row in table.rows for place in quotients} == {None}  # type: ignore[union-attr]


def test_the_report_keeps_the_suites_order_and_has_every_ratio(
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    out, _ = rehearsal
    [measurement] = measurements(load_records(out))
    rows = suite_named("biomistral").rows
    subjects = [result.subject for result in measurement.results]
    assert [(one.base_model, one.variant, one.kernel) for one in subjects] == [
        (row.base_model, row.variant, row.kernel) for row in rows
    ]
    assert [result.is_reference for result in measurement.results] == [True] + [False] * (len(rows) - 1)
    for result in measurement.results[1:]:
        for timing in result.timings.values():
            assert timing.comparison is not None
            assert timing.comparison.reference == subjects[0].name


def test_a_second_time_nothing_is_measured(
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"], shrunken: Path
) -> None:
    out, _ = rehearsal
    before = {name: (out / name).read_bytes() for name in ("records.jsonl", "crossover.jsonl")}
    good = sum(record.status == "ok" for record in read_records(out / "records.jsonl"))
    again = rehearse(out, shrunken, out.parent / "cache")
    assert (again.returncode, again.stderr) == (0, "")
    assert f"({good} of them measured before)" in again.stdout
    after = (out / "records.jsonl").read_bytes()
    assert after.startswith(before["records.jsonl"])
    assert (out / "crossover.jsonl").read_bytes() == before["crossover.jsonl"]


# What the user gets to mend


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DIR", "--suite", "biomistral"], "DIR does not go with --suite, which says what to measure"),
        (["--suite", "biomistral", "--prompt", "3"], "--prompt does not go with --suite"),
        (["--suite", "biomistral", "--records", "r.jsonl"], "--records does not go with --suite"),
        (["--suite", "biomistral", "--kernel", "native"], "--kernel does not go with --suite"),
        (["--suite", "biomistral", "--shape", "x.json"], "--shape is of random weights: add --dummy, or leave it out"),
        (["--suite", "biomistral", "--crossover-time", "-1"], "--crossover-time must be at least 0 seconds"),
        (["--suite", "biomistral", "--rounds", "0"], "--rounds must be at least 1"),
        (["--suite", "other"], "no suite 'other'; there are: biomistral, or name a .toml file"),
        (["DIR", "--dummy"], "--dummy is of a whole table: name it with --suite, or leave it out"),
        (["DIR", "--out", "o"], "--out is of a whole table"),
        (["DIR", "--crossover-time", "0"], "--crossover-time is of a whole table"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, *words).startswith(message)


def test_missing_checkpoints_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "--suite", "biomistral", "--out", tmp_path / "o") == (
        f"{tmp_path / 'o'} lacks BioMistral-7B-FP16 and 7 more: make what is missing with `quantize --suite biomistral "
        f"--out {tmp_path / 'o'}`, or measure random weights with --dummy"
    )
    assert not (tmp_path / "o").exists()


def test_a_shape_and_a_folder_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--suite", "biomistral", "--dummy", "--out")
    assert "is no config.json" in fails(capsys, *words, tmp_path / "o", "--shape", tmp_path / "none.json")
    (tmp_path / "file").touch()
    assert fails(capsys, *words, tmp_path / "file").endswith("is a file: choose another --out")


def test_a_scenario_that_the_suite_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "--suite", "biomistral", "--dummy", "--out", tmp_path, "--scenario", "fast")
    assert message == "suite biomistral has no scenario 'fast'; there are: published, chat, chat-graph"


# Without a model


SUITE = """
shape = "mistral-7b"
[reference]
base_model = "Tiny"
[crossover]
budget_s = 1
[[row]]
base_model = "Tiny"
source = "org/tiny"
variant = "fp16"
[[scenario]]
name = "published"
prompt_tokens = 8
new_tokens = 1
"""


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch, machine: Machine, records_of: Callable[..., list[Record]]) -> None:
    """The campaign's bench runs on a fake machine and measures nothing."""
    faked = partial(
        measure,
        probe_machine=lambda device, threads: machine,
        executor_for=lambda settings, path: records_of,
    )
    monkeypatch.setattr("bench.suite.suite_run.measure", faked)


@pytest.mark.usefixtures("fake_runs")
def test_a_step_that_fails_is_told_and_the_others_are_taken(
    tmp_path: Path, make_checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite_path = tmp_path / "one.toml"
    suite_path.write_text(SUITE)
    out = make_checkpoint("fp16").path.parent
    monkeypatch.setattr("bench.suite.suite_run._tokenizer_of", lambda path: str.split)
    campaign = Campaign(suite_named(str(suite_path)), out, crossover_s=0)
    ran = run_campaign(campaign, BenchOptions(rounds=Rounds(least=1, most=1), quality=False))
    assert ([path.name for path in ran.written], ran.problems) == (["table.md", "published.md"], ())
    (out / "table.md").unlink()
    (out / "table.md").mkdir()
    ran = run_campaign(campaign, BenchOptions(rounds=Rounds(least=1, most=1), quality=False))
    assert [path.name for path in ran.written] == ["published.md"]
    [problem] = ran.problems
    assert problem.startswith("no table.md: cannot write ")
    assert "table.md" in (out / "records.log").read_text()


@pytest.mark.usefixtures("fake_runs")
def test_a_crossover_of_another_device_or_a_damaged_one_is_measured_again(
    tmp_path: Path,
    make_checkpoint: Callable[..., Checkpoint],
    rehearsal: tuple[Path, "subprocess.CompletedProcess[str]"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that would measure it is replaced by one that only says what it was asked."""
    suite_path = tmp_path / "one.toml"
    suite_path.write_text(SUITE)
    folder = make_checkpoint("fp16").path.parent
    asked: list[list[str]] = []

    def run_process(command: list[str], **settings: object) -> Ended:
        asked.append(command)
        return Ended(1, "error: not today", 1.0)

    monkeypatch.setattr("bench.suite.suite_run.run_process", run_process)
    monkeypatch.setattr("bench.suite.suite_run._tokenizer_of", lambda path: str.split)
    campaign = Campaign(suite_named(str(suite_path)), folder)
    options = BenchOptions(rounds=Rounds(least=1, most=1), quality=False)
    kept = (rehearsal[0] / "crossover.jsonl").read_text()
    for text, measured in (("", True), (kept, False), (kept.replace('"device": "cpu"', '"device": "cuda"'), True)):
        (folder / "crossover.jsonl").write_text(text)
        asked.clear()
        ran = run_campaign(campaign, options)
        assert any("bench.crossover" in command for command in asked) is measured
        assert ("no crossover.jsonl: not today" in ran.problems) is measured


def test_a_campaign_out_of_range() -> None:
    suite = suite_named("biomistral")
    with pytest.raises(UserError, match="--shape is of random weights"):
        Campaign(suite, Path("o"), shape="mistral-7b")
    with pytest.raises(UserError, match="at least 0 seconds"):
        Campaign(suite, Path("o"), crossover_s=-0.5)
