"""What NVML shows of a GPU before, between and after the passes of a run; unknown is None. Imports no torch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    process_bytes:    memory of this process, the CUDA context included; device_bytes: what anyone uses of the device.
    sm_clock_mhz:     current clock of the multiprocessors; memory_clock_mhz: current clock of the memory.
    power_limit_w:    the enforced limit; temperature_c: of the GPU die.
    throttle_reasons: names of what holds the clocks down right now, empty when nothing does.
    other_processes:  compute processes on the device beside this one.
    energy_j:         the driver's cumulative counter; only a difference of two looks means anything."""

    process_bytes: int | None = None
    device_bytes: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    other_processes: int | None = None
    energy_j: float | None = None


@dataclass(frozen=True)
class GpuExtremes:
    """Of several looks. looks: how many; throttle_reasons: of all; lowest_sm_clock_mhz, highest_sm_clock_mhz,
    highest_temperature_c, other_processes: the extremes."""

    looks: int = 0
    lowest_sm_clock_mhz: int | None = None
    highest_sm_clock_mhz: int | None = None
    highest_temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    other_processes: int | None = None


def extremes_of(looks: Sequence[GpuState]) -> GpuExtremes:
    """What these looks saw, those left out that could not tell."""

    def told(name: str) -> list[Any]:
        return [value for look in looks if (value := getattr(look, name)) is not None]

    clocks, reasons = told("sm_clock_mhz"), told("throttle_reasons")
    lowest, highest = min(clocks, default=None), max(clocks, default=None)
    hottest, others = (max(told(name), default=None) for name in ("temperature_c", "other_processes"))
    held_down = tuple(dict.fromkeys(itertools.chain.from_iterable(reasons))) if reasons else None
    return GpuExtremes(len(looks), lowest, highest, hottest, held_down, others)


@dataclass(frozen=True)
class GpuStates:
    """A run's looks at its GPU. before, after: one each; between: the extremes between its passes."""

    before: GpuState | None = None
    between: GpuExtremes | None = None
    after: GpuState | None = None

    @property
    def energy_j(self) -> float | None:
        """Joules that the GPU took while the run's passes ran, its warm-up included."""
        before, after = (look.energy_j if look else None for look in (self.before, self.after))
        return None if before is None or after is None else after - before

    @property
    def throttle_reasons(self) -> tuple[str, ...]:
        """Every reason that held the clocks down, each once."""
        return tuple(dict.fromkeys(reason for look in self._looks for reason in look.throttle_reasons or ()))

    @property
    def other_processes(self) -> int:
        """The most other programs that were seen on the GPU."""
        return max((look.other_processes or 0 for look in self._looks), default=0)

    @property
    def _looks(self) -> list[GpuState | GpuExtremes]:
        return [look for look in (self.before, self.between, self.after) if look]
