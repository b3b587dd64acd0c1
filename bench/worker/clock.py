"""Clocks: how long each piece of work took, on the host or on a CUDA device. Imports no torch."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Marks in time, set between pieces of work and read afterwards.

    Setting a mark must cost next to nothing; `intervals_s` may wait for the device.
    """

    def settle(self) -> None:
        """Return once the device has nothing left to do, so that earlier work is not counted."""

    def mark(self) -> Mark:
        """A mark behind all work asked for up to now."""

    def intervals_s(self, marks: Sequence[Mark]) -> list[float]:
        """Seconds between each mark and the next: one fewer than there are marks."""


class HostClock:
    """The process's monotonic clock, for devices that have finished the work when the call returns."""

    def settle(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def intervals_s(self, marks: Sequence[float]) -> list[float]:
        return [end - start for start, end in itertools.pairwise(marks)]


class CudaClock:
    """Events on the current CUDA stream: device time, idle gaps while the host falls behind included."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def settle(self) -> None:
        self._cuda.synchronize()

    def mark(self) -> "torch.cuda.Event":
        event = self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def intervals_s(self, marks: Sequence["torch.cuda.Event"]) -> list[float]:
        if marks:
            marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]


def clock_for(device_type: str) -> Clock[Any]:
    """The clock that means something on this device type ("cpu" or "cuda")."""
    return CudaClock() if device_type == "cuda" else HostClock()


def seconds_of_each(works: Sequence[Callable[[], object]], clock: Clock[Any]) -> list[float]:
    """Do these pieces of work one after the other: the seconds of each."""
    clock.settle()
    marks = [clock.mark()]
    for work in works:
        work()
        marks.append(clock.mark())
    return clock.intervals_s(marks)
