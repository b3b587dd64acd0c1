"""What NVML shows of a GPU before, between and after the passes of a run; unknown is None. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    process_bytes:    memory of this process, the CUDA context included.
    device_bytes:     memory in use on the whole device, by anyone.
    sm_clock_mhz:     current clock of the multiprocessors.
    memory_clock_mhz: current clock of the memory.
    power_limit_w:    the enforced limit.
    temperature_c:    of the GPU die.
    throttle_reasons: names of what holds the clocks down right now, empty when nothing does.
    other_processes:  compute processes on the device beside this one.
    energy_j:         the driver's cumulative counter; only a difference of two looks means anything.
    """

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
    """The extremes over several looks.

    looks:                 how many there were.
    lowest_sm_clock_mhz:   over the looks, as the next four.
    highest_sm_clock_mhz:  see above.
    highest_temperature_c: see above.
    throttle_reasons:      every name that was seen.
    other_processes:       the most that were seen.
    """

    looks: int = 0
    lowest_sm_clock_mhz: int | None = None
    highest_sm_clock_mhz: int | None = None
    highest_temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    other_processes: int | None = None

    def with_sample(self, state: GpuState) -> "GpuExtremes":
        """These extremes after one more look."""
        reasons = self.throttle_reasons
        if state.throttle_reasons is not None:
            reasons = tuple(dict.fromkeys((*(reasons or ()), *state.throttle_reasons)))
        return replace(
            self,
            looks=self.looks + 1,
            lowest_sm_clock_mhz=_extreme(min, self.lowest_sm_clock_mhz, state.sm_clock_mhz),
            highest_sm_clock_mhz=_extreme(max, self.highest_sm_clock_mhz, state.sm_clock_mhz),
            highest_temperature_c=_extreme(max, self.highest_temperature_c, state.temperature_c),
            other_processes=_extreme(max, self.other_processes, state.other_processes),
            throttle_reasons=reasons,
        )


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
        looks = (self.before, self.between, self.after)
        return tuple(dict.fromkeys(reason for look in looks if look for reason in look.throttle_reasons or ()))

    @property
    def other_processes(self) -> int:
        """The most other programs that were seen on the GPU."""
        looks = (self.before, self.between, self.after)
        return max((look.other_processes or 0 for look in looks if look), default=0)


def _extreme(which: Callable[..., int], current: int | None, new: int | None) -> int | None:
    values = [value for value in (current, new) if value is not None]
    return which(values) if values else None
