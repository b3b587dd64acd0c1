"""What a shell sees of a command: exit codes and lines, whatever happens to its output."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UserError
from quantize.shell import guarded

WORK = """
import sys, time, pathlib
from quantize.shell import guarded
def work():
    {body}
sys.exit(guarded("quantize", work))
"""


def command(body: str) -> list[str]:
    return [sys.executable, "-c", WORK.format(body=body.replace("\n", "\n    "))]


def refuse() -> int:
    raise UserError("choose another --out")


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_the_works_own(result: int | None, code: int) -> None:
    assert guarded("bench", lambda: result) == code


def test_what_the_user_can_fix_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("bench", refuse) == 2
    assert capsys.readouterr() == ("", "error: choose another --out\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded("bench", lambda: 1 // 0)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_work_clean_up(sent: signal.Signals, code: int) -> None:
    body = "try:\n    print('at work', flush=True); time.sleep(600)\nfinally:\n    print('cleaned')"
    with subprocess.Popen(command(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.endswith("cleaned\n")
    assert err == "interrupted: what is finished is kept, the same quantize again goes on\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_work_goes_on_when_the_reader_leaves(stream: str, tmp_path: Path) -> None:
    body = f"for i in range(20000): print(i, file=sys.{stream}, flush=True)\npathlib.Path('done').touch()"
    pipes: dict[str, Any] = {stream: subprocess.PIPE}
    with subprocess.Popen(command(body), cwd=tmp_path, env=environment(), **pipes) as process:
        pipe = getattr(process, stream)
        pipe.readline()
        pipe.close()
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("print('x' * 100000)\npathlib.Path('done').touch()"),
            cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: the output could not be written (No space left on device)")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "done").exists()


def test_a_character_that_the_terminal_lacks_is_a_question_mark(tmp_path: Path) -> None:
    done = subprocess.run(
        command("print('Gr\\u00fc\\u00dfe \\u6a21')"), capture_output=True, cwd=tmp_path, check=False,
        env=environment() | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Gr??e ?\n", b"")


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    shell = f'{sys.executable} -c "$WORK" >&- 2>&-'
    code = command("print('x'); print('y', file=sys.stderr)")[-1]
    variables = environment() | {"WORK": code}
    assert subprocess.run(["sh", "-c", shell], env=variables, cwd=tmp_path, check=False).returncode == 0


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
