import pytest
import torch

from bench.worker.clock import CudaClock, HostClock
from tests.fake_clock import FakeClock


def test_intervals_lie_between_marks() -> None:
    clock = FakeClock()
    marks = [clock.mark()]
    for seconds in (2.0, 0.25, 0.5):
        clock.advance(seconds)
        marks.append(clock.mark())
    assert clock.intervals_s(marks) == [2.0, 0.25, 0.5]


@pytest.mark.parametrize("clock", [HostClock(), FakeClock()])
def test_a_single_mark_has_no_interval(clock: HostClock | FakeClock) -> None:
    clock.settle()
    assert clock.intervals_s([clock.mark()]) == []


def test_host_clock_never_runs_backwards() -> None:
    clock = HostClock()
    intervals = clock.intervals_s([clock.mark() for _ in range(1000)])
    assert len(intervals) == 999
    assert min(intervals) >= 0
    assert sum(intervals) > 0


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
