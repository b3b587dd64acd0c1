"""Clocks: how long each piece of work took, on the host or on a CUDA device. Imports no torch."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any


class Clock:
    """The process's monotonic clock, for devices that have finished the work when the call returns.

    Marks are set between pieces of work, at next to no cost, and read afterwards."""

    def settle(self) -> None:
        """Return once the device has nothing left to do, so that earlier work is not counted."""

    def mark(self) -> Any:
        """A mark behind all work asked for up to now."""
        return time.perf_counter()

    def intervals_s(self, marks: Sequence[Any]) -> list[float]:
        """Seconds between each mark and the next: one fewer than there are marks. May wait for the device."""
        return [end - start for start, end in itertools.pairwise(marks)]


class CudaClock(Clock):
    """Events on the current CUDA stream: device time, idle gaps while the host falls behind included."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def settle(self) -> None:
        self._cuda.synchronize()

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def intervals_s(self, marks: Sequence[Any]) -> list[float]:
        if marks:
            marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]


def clock_for(device_type: str) -> Clock:
    """The clock that means something on this device type ("cpu" or "cuda")."""
    return CudaClock() if device_type == "cuda" else Clock()


def seconds_of_each(works: Sequence[Callable[[], object]], clock: Clock) -> list[float]:
    """Do these pieces of work one after the other: the seconds of each."""
    clock.settle()
    marks = [clock.mark()]
    for work in works:
        work()
        marks.append(clock.mark())
    return clock.intervals_s(marks)
