"""`bench --suite`: a whole table in one command, rehearsed on a shrunken model on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cli import main
from bench.records.store import read_records
from bench.suite.suite import suite_named
from bench.suite.suite_run import run_suite
from bench.worker.options import BenchOptions
from quantize.errors import UserError
from reports.api import write_all
from reports.published import BIOMISTRAL, published_tables, versus_page
from reports.results import measurements

ROOT = Path(__file__).parents[3]
SUITE = """
shape = "mistral-7b"
[reference]
base_model = "BioMistral-7B"
[rule]
max_warmups = 2
min_passes = 1
max_time_s = 0.1
[[scenario]]
name = "published"
lengths = [20, 60]
new_tokens = 1
[[scenario]]
name = "chat-graph"
prompt_tokens = 16
new_tokens = 4
mode = "graph"
"""
ROW = """
[[row]]
base_model = "BioMistral-7B"
source = "BioMistral/BioMistral-7B"
variant = "{}"
"""
ROWS = ROW.format("fp16") + ROW.format("awq-gemm") + "group_size = 128\n" + ROW.format("bnb-4bit")
ROWS += ROW.format("awq-gemm") + 'group_size = 128\nkernel = "native"\npublished = false\n'
SCENARIOS = ["published", "chat-graph"]
FILES = {".records.jsonl.lock", "records.jsonl", "records.log"}
"""Everything that the command may write; the log when something failed."""

PLOTS = {f"{name}.{form}" for name in ("time", "memory") for form in ("png", "svg")}
PAGES = {"table.md", "published.md", *PLOTS}
"""What `report --all` makes of it."""


def rehearse(suite: Path, out: Path, shape: Path, cache: Path) -> "subprocess.CompletedProcess[str]":
    """The command as a user types it, with one round."""
    command = [sys.executable, "-m", "bench", "--suite", str(suite), "--dummy", "--shape", str(shape)]
    command += ["--device", "cpu", "--rounds", "1", "--max-time", "0", "--out", str(out)]
    command += ["--dtype", "float32", "--threads", "1"]
    environment = {**os.environ, "QUANTABLE_CACHE": str(cache)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


Rehearsal = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def rehearsal(shrunken: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """The folder that the command filled, and what it said."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "four.toml").write_text(SUITE + ROWS)
    return folder / "out", rehearse(folder / "four.toml", folder / "out", shrunken, folder / "cache")


def test_the_command_measures_every_row(rehearsal: Rehearsal) -> None:
    """The kernels that rows ask for by name are not on every machine: then the code is 1, and the record says why."""
    out, ran = rehearsal
    records = read_records(out / "records.jsonl")
    failed = any(record.status != "ok" for record in records)
    assert ran.returncode == int(failed), ran.stdout
    assert ran.stderr.startswith("bench: ")
    assert "Warning" not in ran.stderr
    suite = suite_named(str(out.parent / "four.toml"))
    assert [(record.subject.base_model, record.subject.variant, record.subject.kernel) for record in records] == [
        (row.base_model, row.variant, row.kernel) for row in suite.rows for _ in SCENARIOS
    ]
    assert [record.scenario.name for record in records if record.scenario] == SCENARIOS * len(suite.rows)
    published = [record for record in records if record.subject.kernel is None]
    assert [(record.subject.name, record.reason) for record in published if record.status != "ok"] == []
    assert f"{len(records)} records" in ran.stdout
    assert ran.stdout.splitlines()[-1] == f"the tables: report {out} --all"
    assert str(ROOT) not in (out / "records.jsonl").read_text()


def test_it_leaves_records_and_report_makes_the_pages(rehearsal: Rehearsal) -> None:
    out, ran = rehearsal
    written = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert written <= FILES | PAGES
    assert "records.jsonl" in written, ran.stdout
    pages, problems, _ = write_all(out)
    if importlib.util.find_spec("matplotlib"):
        assert ({path.name for path in pages}, problems) == (PAGES, [])
    else:
        assert problems == ["no plots: plots need matplotlib: install quantable[plots]"]


def test_the_page_has_the_eight_rows_in_the_published_order(rehearsal: Rehearsal) -> None:
    out, _ = rehearsal
    [measurement] = measurements(read_records(out / "records.jsonl"))
    table = next(iter(versus_page([measurement])))
    expected = [
        (row.base_model, row.method, row.q_group_size, row.w_bit, row.version)
        for row in published_tables()[BIOMISTRAL].row
    ]
    assert [row[:5] for row in table.rows] == expected  # type: ignore[union-attr]
    time = table.titles.index("Measured Time")  # type: ignore[union-attr]
    times = [row[time] for row in table.rows]  # type: ignore[union-attr]
    assert times[0] == 1.0
    assert [isinstance(one, float) for one in times] == [True, True, False, True, False, False, False, False]


def test_a_rehearsal_does_not_pass_for_the_table(rehearsal: Rehearsal) -> None:
    out, _ = rehearsal
    [measurement] = measurements(read_records(out / "records.jsonl"))
    page = list(versus_page([measurement]))
    said = page[-1].text  # type: ignore[union-attr]
    assert "random, in the shape shrunken, 2 layers, hidden size 256" in said
    assert "It is not the shape of the published models (32 layers, hidden size 4096)" in said
    table = page[0]
    quotients = [place for place, title in enumerate(table.titles) if "/ published" in title]  # type: ignore[union-attr]
    assert len(quotients) == 2
    assert {row[place] for row in table.rows for place in quotients} == {None}  # type: ignore[union-attr]


def test_the_report_keeps_the_suites_order_and_has_every_ratio(rehearsal: Rehearsal) -> None:
    out, _ = rehearsal
    [measurement] = measurements(read_records(out / "records.jsonl"))
    subjects = [result.subject for result in measurement.results]
    assert [(one.variant, one.kernel) for one in subjects] == [
        ("fp16", None),
        ("awq-gemm", None),
        ("bnb-4bit", None),
        ("awq-gemm", "native"),
    ]
    assert [result.is_reference for result in measurement.results] == [True, False, False, False]
    for result in measurement.results[1:]:
        for timing in result.timings.values():
            assert timing.comparison is not None
            assert timing.comparison.reference == subjects[0].name


def test_a_second_time_nothing_is_measured(rehearsal: Rehearsal, shrunken: Path) -> None:
    out, _ = rehearsal
    before = (out / "records.jsonl").read_bytes()
    good = sum(record.status == "ok" for record in read_records(out / "records.jsonl"))
    again = rehearse(out.parent / "four.toml", out, shrunken, out.parent / "cache")
    assert again.returncode == rehearsal[1].returncode
    assert "prefill" not in again.stderr, "no row is measured anew"
    assert f"({good} of them measured before)" in again.stdout
    assert (out / "records.jsonl").read_bytes().startswith(before)


# What the user can fix


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
        (["--suite", "biomistral", "--rounds", "0"], "--rounds must be at least 1"),
        (["--suite", "other"], "no suite 'other'; there are: autoawq-mistral-7b, biomistral"),
        (["DIR", "--dummy"], "--dummy is of a whole table: name it with --suite, or leave it out"),
        (["DIR", "--out", "o"], "--out is of a whole table"),
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


def test_a_suite_run_out_of_range() -> None:
    suite = suite_named("biomistral")
    with pytest.raises(UserError, match="--shape is of random weights"):
        run_suite(suite, Path("o"), BenchOptions(), shape="mistral-7b")
