"""The command over all commands, as a user meets it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantable import cli
from quantize.cli import main as quantize_main
from quantize.shell import called
from quantize.versions import VERSION, version_of

ROOT = Path(__file__).resolve().parents[2]
THERE = {name: row for name, row in cli.COMMANDS.items() if (ROOT / f"{row[0].replace('.', '/')}.py").exists()}

QUICK = """
import json, sys
from quantable.cli import main
heavy, found = {"torch", "transformers", "numpy", "safetensors", "matplotlib", "huggingface_hub", "rich"}, []
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    found.append([code, sorted(heavy & set(sys.modules))])
print(json.dumps(found))
"""


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_parser_and_a_main(name: str) -> None:
    if name not in THERE:
        pytest.skip(f"{cli.COMMANDS[name][0]} is not written")
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert module.parser().prog.removeprefix("quantable ") == name
    assert callable(module.main)


def test_help_versions_and_bad_options_import_no_library_that_touches_a_model(tmp_path: Path) -> None:
    good = [["--help"], ["--version"], [], *([name, "--help"] for name in THERE), ["bench", "--version"]]
    bad = [
        ["talk"], ["quantize", "m"], ["quantize", "m", "--speed", "--out", "x"], ["report"], ["card"], ["push"],
        ["quantize", "m", "--variant", "awq", "--out", "x"], ["bench", str(tmp_path), "--kernel", "fastest"],
        ["bench", str(tmp_path), "--rounds", "0"], ["report", str(tmp_path), "--format", "xml"],
    ]  # fmt: skip
    ran = python("-c", QUICK, json.dumps([*good, *bad]))
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found == [[0, []]] * len(good) + [[2, []]] * len(bad)
    lines = ran.stderr.splitlines()
    assert len(lines) == len(bad)
    assert all(line.startswith("error: ") for line in lines)
    assert any("unknown variant 'awq'; there are: fp16, " in line for line in lines)


def test_a_command_says_the_name_that_the_user_called() -> None:
    assert python("-m", "quantable", "quantize", "--help").stdout.startswith("usage: quantable quantize ")
    assert python("-m", "quantize", "--help").stdout.startswith("usage: quantize ")
    wrong = python("-m", "quantable", "report", "x", "--speed")
    assert wrong.stderr == "error: unrecognized arguments: --speed: `quantable report --help` lists what there is\n"


@pytest.mark.parametrize(
    ("started", "name"), [("/bin/quantable", "quantable bench"), ("/quantable/bench", "bench"), ("", "bench")]
)
def test_the_name_is_of_what_was_started(started: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert called("bench") == name


def test_the_version_and_those_of_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    first, *libraries = capsys.readouterr().out.splitlines()
    assert first == f"quantable {VERSION}"
    assert f"torch {version_of('torch')}" in libraries


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["quantable", "qu"], ["quantize"]),
        (["quantable", "bench", "--quality-"], ["--quality-data"]),
        (["report", "--publ"], ["--published"]),
    ],
)
def test_bash_completes_commands_and_options(
    words: list[str], completed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", THERE)
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_{words[0]}; echo ${{COMPREPLY[@]}}"
    command = ["bash", "--norc", "-c", f"{cli.completion('bash')}\n{ask}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == completed
    assert cli.completion("zsh").startswith("#compdef quantable")


def test_json_is_one_object_a_checkpoint_and_quiet_is_only_what_is_made(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(tiny_llama), "--variant", "fp16", "--out", str(tmp_path)]
    assert quantize_main([*call, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["variant"], made["kept"], made["path"]) == ("fp16", False, str(tmp_path / "tiny-llama-FP16"))
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "tiny-llama-FP16").iterdir()) - (
        (tmp_path / "tiny-llama-FP16" / "quantable.json").stat().st_size
    )
    assert quantize_main([*call, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == made | {"kept": True}
    assert "finished before, kept" in err
    assert quantize_main([*call, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert (out.startswith(f"{tmp_path / 'tiny-llama-FP16'}: "), out.count("\n"), err) == (True, 1, "")
