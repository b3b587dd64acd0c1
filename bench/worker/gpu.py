"""The GPU as NVML sees it, through the module `pynvml`: what cannot be told is None. Imports no torch."""

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

from bench.records.gpu_state import GpuState

T = TypeVar("T")

THROTTLE_REASONS = {  # bits of NVML's mask of clock event reasons; 0x01, an idle GPU, holds nothing down
    0x02: "application clocks", 0x04: "power cap", 0x08: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
    0x100: "display clocks",
}  # fmt: skip


class Nvml:
    """One GPU. Every query that fails gives None; nothing here raises."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._pynvml, self._handle = pynvml, handle

    def driver(self) -> str | None:
        return self._ask(lambda: str(self._pynvml.nvmlSystemGetDriverVersion()))

    def state(self) -> GpuState:
        n, handle = self._pynvml, self._handle
        process_bytes, others = self._processes()
        mask = self._ask(lambda: int(n.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        reasons = None if mask is None else tuple(what for bit, what in THROTTLE_REASONS.items() if mask & bit)
        return GpuState(
            process_bytes=process_bytes,
            device_bytes=self._ask(lambda: int(n.nvmlDeviceGetMemoryInfo(handle).used)),
            sm_clock_mhz=self._ask(lambda: int(n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM))),
            memory_clock_mhz=self._ask(lambda: int(n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_MEM))),
            power_limit_w=self._ask(lambda: n.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            temperature_c=self._ask(lambda: int(n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU))),
            throttle_reasons=reasons,
            other_processes=others,
            energy_j=self._ask(lambda: n.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
        )

    def _processes(self) -> tuple[int | None, int | None]:
        """Bytes of this process, and how many others there are; neither where a container's numbers hide this one."""
        running = self._ask(lambda: list(self._pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle))) or []
        own = [process for process in running if process.pid == os.getpid()]
        if not own:
            return None, None
        used = own[0].usedGpuMemory
        return (None if used is None else int(used)), len({process.pid for process in running}) - 1

    def _ask(self, query: Callable[[], T]) -> T | None:
        try:
            return query()
        except (self._pynvml.NVMLError, AttributeError, TypeError, ValueError):
            return None


def open_nvml(uuid: str | None = None) -> Nvml | None:
    """The GPU of this UUID, as CUDA names it, or the only one there is; None without pynvml, a driver or such a GPU."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    with contextlib.suppress(pynvml.NVMLError, AttributeError):
        pynvml.nvmlInit()
        if uuid is not None:
            full = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(full))
        if pynvml.nvmlDeviceGetCount() == 1:
            return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
    return None


def cuda_uuid() -> str:
    """UUID of torch's current CUDA device."""
    import torch

    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
