from typing import ClassVar

import pytest
import torch

from bench.worker.clock import Clock, CudaClock, clock_for
from tests.fake_clock import FakeClock


def test_intervals_lie_between_marks() -> None:
    clock = FakeClock()
    marks = [clock.mark()]
    for seconds in (2.0, 0.25, 0.5):
        clock.advance(seconds)
        marks.append(clock.mark())
    assert clock.intervals_s(marks) == [2.0, 0.25, 0.5]


@pytest.mark.parametrize("clock", [Clock(), FakeClock()])
def test_a_single_mark_has_no_interval(clock: Clock) -> None:
    clock.settle()
    assert clock.intervals_s([clock.mark()]) == []


def test_host_clock_never_runs_backwards() -> None:
    clock = Clock()
    intervals = clock.intervals_s([clock.mark() for _ in range(1000)])
    assert len(intervals) == 999
    assert min(intervals) >= 0
    assert sum(intervals) > 0


class FakeEvent:
    """A CUDA event: the n-th that is recorded happens after n seconds."""

    recorded: ClassVar[list["FakeEvent"]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.waited_for = False

    def record(self) -> None:
        self.recorded.append(self)

    def synchronize(self) -> None:
        self.waited_for = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.recorded[-1].waited_for
        return 1000.0 * (self.recorded.index(end) - self.recorded.index(self))


def test_cuda_events_are_read_in_seconds_once_the_last_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = clock_for("cuda")
    marks = [clock.mark() for _ in range(3)]
    assert clock.intervals_s(marks[::2]) == [2.0]
    assert clock.intervals_s([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_clock_waits_for_the_work_it_times() -> None:
    clock = CudaClock()
    square = torch.ones(4096, 4096, device="cuda")
    (square @ square).sum()
    clock.settle()
    marks = [clock.mark()]
    for repeats in (1, 20):
        for _ in range(repeats):
            square @ square
        marks.append(clock.mark())
    one, twenty = clock.intervals_s(marks)
    assert twenty > 5 * one > 0
