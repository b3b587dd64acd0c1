"""What is told of long work: time left from finished steps, by a clock that stands still unless told to go on."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantize.progress import Progress, progress_bar, span
from tests.fake_clock import FakeClock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def progress(clock: FakeClock) -> Progress:
    return Progress(clock=clock.mark)


def test_time_left_follows_from_the_finished_steps_and_runs_down_inside_one(
    progress: Progress, clock: FakeClock
) -> None:
    clock.advance(100)  # before the first step: not counted
    progress.plan([("layer", "", 1.0)] * 4)
    assert progress.seconds() is None
    assert progress.share == 0
    clock.advance(10)
    progress.advance()
    assert progress.seconds() == (10, 30)
    assert progress.share == 0.25
    clock.advance(4)
    assert progress.seconds() == (14, 26)
    clock.advance(50)  # longer than was to be expected: the others are still to come
    assert progress.seconds() == (20, 20)
    progress.begin("layer 2 of 4")
    assert progress.line() == "50% after 164 s, 20 s left: layer 2 of 4".replace("164 s", span(164))


def test_a_part_of_a_step_tells_of_the_rest_and_costs_weigh(progress: Progress, clock: FakeClock) -> None:
    progress.plan([("copy", "fp16", 10.0), ("copy", "bnb-8bit", 5.0)])
    clock.advance(2)
    progress.advance(cost=2.0)
    assert progress.seconds() == (2, 13)
    progress.advance(cost=20.0)  # more than was planned does not end it
    progress.advance()
    assert [name for _, name, _ in progress._left] == ["bnb-8bit"]


def test_the_same_on_the_same_tells_most_then_the_same_on_others(progress: Progress, clock: FakeClock) -> None:
    progress.plan([(kind, name, 1.0) for name in "ABAB" for kind in ("chat", "quality")])
    for seconds in (1, 5):
        clock.advance(seconds)
        progress.advance()
    assert progress.seconds() == (6, 18)  # B as A
    for seconds in (3, 9):
        clock.advance(seconds)
        progress.advance()
    assert progress.seconds() == (18, 18)  # A as A, B as B


def test_steps_that_end_together_run_down_together(progress: Progress, clock: FakeClock) -> None:
    progress.plan([("chat", name, 1.0) for name in "AABBBB"])
    for _ in range(2):
        clock.advance(10)
        progress.advance()
    progress.begin("B", together=2)
    clock.advance(15)
    assert progress.seconds() == (35, 25)
    progress.advance(seconds=6.0)
    progress.advance()
    assert progress.seconds() == (35, 15)  # 6 and 9 seconds


def test_no_time_left_is_claimed_of_what_has_not_been_seen(progress: Progress, clock: FakeClock) -> None:
    progress.plan([("copy", "fp16", 1.0), ("layer", "", 50.0), ("copy", "awq-gemm", 1.0)])
    clock.advance(1)
    progress.advance()
    assert progress.seconds() is None
    clock.advance(100)
    progress.advance()
    assert progress.seconds() == (101, 1)


def test_work_that_may_grow_says_at_least(progress: Progress, clock: FakeClock) -> None:
    progress.grows_until_s = 30.0
    progress.plan([("chat", "A", 1.0)] * 3)
    clock.advance(10)
    progress.advance()
    assert "at least 20 s left" not in progress.line()  # exactly then: no more
    progress.grows_until_s = 31.0
    assert "at least 20 s left" in progress.line()


def test_without_a_terminal_there_are_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("quantize: reading org/name", every_s=0.01) as progress:
        assert capfd.readouterr().err.startswith("quantize: reading org/name\n")
        progress.begin("layer 1 of \x1b[31m2")
        for _ in range(6000):
            if lines := [line for line in capfd.readouterr().err.splitlines() if "layer 1" in line]:
                break
            time.sleep(0.01)
        progress.row("a row")
    assert lines[0].endswith(r": layer 1 of \x1b[31m2")
    rest = capfd.readouterr()
    assert "a row\n" in rest.err
    assert re.search(r"done after \d+ s\n$", rest.err)
    assert rest.out == ""


def test_no_bar_where_none_is_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("first", quiet=True) as progress:
        progress.begin("doing")
        progress.row("a row")
    assert capfd.readouterr() == ("", "")


PROGRAM = """
from quantize.progress import progress_bar
with progress_bar("reading") as progress:
    print("before")
    progress.plan([("layer", "", 1.0)] * 2)
    progress.begin("layer 1 of 2")
    progress.row("a row")
    print("for a file")
"""


def test_on_a_terminal_there_is_a_bar_and_output_goes_where_it_was_sent() -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=terminal) as process:
        out, _ = process.communicate()
    os.close(terminal)
    drawn = os.read(controller, 10_000).decode()
    os.close(controller)
    assert process.returncode == 0
    assert out == b"before\nfor a file\n"
    assert drawn.startswith("reading\r\n")
    assert "a row\r\n" in drawn
    assert "[................] after 0 s: layer 1 of 2" in drawn
