"""The command `report`, as a user meets it."""

import csv
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.records.record import Record
from reports import api, cli, report
from reports.cli import main

if TYPE_CHECKING:
    from tests.builder import Builder

Write = Callable[[Iterable[Record]], Path]

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_MODELS = """
import sys

class OnlyLight:
    ours = {"reports", "bench", "quantize"}
    allowed = {*sys.stdlib_module_names, *ours, "rich", "pygments", "markdown_it", "mdurl", "msgspec", "filelock"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, OnlyLight())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("the hook does not work")
from reports.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
raise SystemExit(f"imported {heavy}" if heavy else code)
"""


def run(*arguments: str | Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "reports"] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def on_a_terminal(*arguments: str | Path, code: str | None = None) -> str:
    """What the command writes when stdout is a terminal of 200 columns."""
    start = ["-m", "reports"] if code is None else ["-c", code]
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, *start, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer, env=environment) as process:
        os.close(writer)
        chunks = []
        while True:
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(reader)
    assert process.returncode == 0
    return b"".join(chunks).decode()


def test_piped_it_prints_the_screen_and_the_long_page_as_markdown(builder: "Builder", write: Write) -> None:
    folder = write(builder.five_rows())
    done = run(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == report(folder, format="text")
    assert run(folder, "--full").stdout == report(folder, view="full")


def test_it_works_with_nothing_installed_that_touches_a_model(builder: "Builder", write: Write, tmp_path: Path) -> None:
    folder = write(builder.five_rows())
    for form in ("text", "md", "csv", "json", "html"):
        done = run(folder, "--format", form, code=WITHOUT_MODELS)
        assert (done.returncode, done.stderr) == (0, "")
        assert "BnB.8" in done.stdout
    assert run(tmp_path / "missing", code=WITHOUT_MODELS).returncode == 2
    assert "BnB.8" in on_a_terminal(folder, code=WITHOUT_MODELS)


def test_on_a_terminal_it_prints_a_table_of_rich(builder: "Builder", write: Write) -> None:
    folder = write(builder.five_rows())
    shown = on_a_terminal(folder)
    assert "x10.33" in on_a_terminal(folder, "--full")
    assert "AWQ GEMV, group 64" in shown
    assert "\x1b[1m" in shown
    assert "| :--" not in shown
    assert json.loads(on_a_terminal(folder, "--format", "json"))["measurements"]


def test_out_writes_a_file_and_says_so(
    builder: "Builder", write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write(builder.five_rows()), tmp_path / "table.md"
    assert main([str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_text(encoding="utf-8") == report(folder)


def test_csv_and_json_come_out_alone(builder: "Builder", write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(builder.five_rows())
    assert main([str(folder), "--format", "csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 10
    assert main([str(folder), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == 1


def test_bad_input_is_one_line_and_exit_code_2(
    builder: "Builder", write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\x80\xff" * 50)
    no_reference = write([builder.latency("bnb-4bit")])
    for source, words in (
        (tmp_path / "missing", "no such folder or file"),
        (empty, "no record file"),
        (binary, "no record file"),
        (no_reference, "no latency record of the reference"),
    ):
        assert main([str(source)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert words in captured.err
        assert captured.err.count("\n") == 1


def test_options_of_the_plots_are_checked_before_anything_is_shown(
    builder: "Builder", write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(builder.five_rows()))
    for words, message in (
        (["--memory", "6GB"], "add --plots"),
        (["--context", "8"], "add --plots"),
        (["--plots", "--memory", "6"], "is no size"),
    ):
        assert main([folder, *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err


def test_the_command_offers_every_format() -> None:
    assert cli.FORMATS == api.FORMATS


def test_a_format_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--format", "xml"])
    assert stopped.value.code == 2
    assert "invalid choice: 'xml'" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(builder: "Builder", write: Write) -> None:
    folder = write(builder.five_rows())
    command = f'"{sys.executable}" -m reports "{folder}" | true'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_terminal_that_cannot_show_the_dash(builder: "Builder", write: Write) -> None:
    folder = write([builder.latency("fp16", memory=None)])
    command = [sys.executable, "-m", "reports", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FP16/BF16" in done.stdout
    assert "?" in done.stdout


@pytest.mark.parametrize("more", [(), ("--format", "csv"), ("--format", "json"), ("--published",), ("--all",)])
@pytest.mark.parametrize("what", ["broken", "failed", "sound"])
def test_the_code_is_1_for_a_broken_checkpoint_and_a_failed_run(
    builder: "Builder", write: Write, what: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    worse = {
        "broken": builder.quality("awq-gemm", 900.0),
        "failed": builder.failure("awq-gemm", "oom", "no memory left", round=7),
        "sound": builder.latency("fp16", round=9),
    }[what]
    code = main([str(write([*builder.five_rows(), worse])), *more])
    assert code == (0 if what == "sound" else 1)
    if not more:
        said = " ".join(capsys.readouterr().out.split("\n\n")[1].split())
        assert (said == "- AWQ GEMM, group 64, broken: its perplexity is x60 the reference's. Do not use it.") == (
            what == "broken"
        )
