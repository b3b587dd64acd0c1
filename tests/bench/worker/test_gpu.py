import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from bench.records.gpu_state import GpuState
from bench.worker.gpu import THROTTLE_REASONS, Nvml, open_nvml


class NVMLError(Exception):
    pass


def refuse(*arguments: Any) -> Any:
    raise NVMLError("Not Supported")


class FakePynvml(SimpleNamespace):
    """The calls that are used, for one card with this process and one other on it."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **replaced: Any) -> None:
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3_000_000)
        other = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=9_000_000)
        calls: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: f"card {index}",
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlSystemGetDriverVersion": lambda: "570.1",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=12_500_000),
            "nvmlDeviceGetClockInfo": lambda handle, which: {1: 1980, 2: 2619}[which],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 350_500,
            "nvmlDeviceGetTemperature": lambda handle, which: 41,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x01 | 0x04 | 0x40,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7_250,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [other, own],
        }
        super().__init__(**(calls | replaced))


def open_with(pynvml: FakePynvml, uuid: str | None = None) -> Nvml | None:
    """What is opened where this is the module."""
    with patch.dict(sys.modules, pynvml=pynvml):
        return open_nvml(uuid)


def opened(**replaced: Any) -> Nvml:
    nvml = open_with(FakePynvml(**replaced))
    assert nvml is not None
    return nvml


def test_a_look_at_a_card_that_tells_everything() -> None:
    assert opened().state() == GpuState(
        process_bytes=3_000_000,
        device_bytes=12_500_000,
        sm_clock_mhz=1980,
        memory_clock_mhz=2619,
        power_limit_w=350.5,
        temperature_c=41,
        throttle_reasons=("power cap", "hardware thermal slowdown"),
        other_processes=1,
        energy_j=7.25,
    )


def test_the_drivers_version_is_told_or_none() -> None:
    assert opened().driver() == "570.1"
    assert opened(nvmlSystemGetDriverVersion=refuse).driver() is None


def test_a_card_that_tells_nothing_is_none_and_never_zero() -> None:
    queries = [name for name in vars(FakePynvml()) if name.startswith("nvmlDeviceGet")]
    queries = [name for name in queries if "Handle" not in name and "Count" not in name]
    assert opened(**dict.fromkeys(queries, refuse)).state() == GpuState()


def test_one_query_that_fails_takes_no_other_with_it() -> None:
    state = opened(nvmlDeviceGetTotalEnergyConsumption=refuse).state()
    assert state.energy_j is None
    assert state.power_limit_w == 350.5


def test_a_call_that_an_old_module_lacks_is_none() -> None:
    fake = FakePynvml()
    del fake.nvmlDeviceGetTotalEnergyConsumption
    nvml = open_with(fake)
    assert nvml is not None
    assert nvml.state().energy_j is None


def test_in_a_container_neither_this_process_nor_the_others_can_be_told() -> None:
    strangers = [SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=1)]
    state = opened(nvmlDeviceGetComputeRunningProcesses=lambda handle: strangers).state()
    assert (state.process_bytes, state.other_processes) == (None, None)
    state = opened(nvmlDeviceGetComputeRunningProcesses=lambda handle: []).state()
    assert (state.process_bytes, state.other_processes) == (None, None)


def test_memory_that_the_driver_keeps_to_itself_is_none_but_the_process_counts() -> None:
    own = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]
    state = opened(nvmlDeviceGetComputeRunningProcesses=lambda handle: own).state()
    assert (state.process_bytes, state.other_processes) == (None, 0)


def test_nothing_throttles_an_idle_card() -> None:
    assert opened(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x01).state().throttle_reasons == ()


@pytest.mark.parametrize("uuid", ["1234", "GPU-1234"])
def test_the_card_is_the_one_that_cuda_uses(uuid: str) -> None:
    asked: list[str] = []
    open_with(FakePynvml(nvmlDeviceGetCount=lambda: 8, nvmlDeviceGetHandleByUUID=asked.append), uuid)
    assert asked == ["GPU-1234"]


def test_of_several_cards_none_is_guessed() -> None:
    assert open_with(FakePynvml(nvmlDeviceGetCount=lambda: 2)) is None


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_no_driver_or_no_such_card_is_none(call: str) -> None:
    assert open_with(FakePynvml(**{call: refuse}), "GPU-1234") is None


def test_no_module_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None


def test_the_reasons_are_nvmls_own_bits() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert {
        pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "application clocks",
        pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
        pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
        pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
        pynvml.nvmlClocksEventReasonSwThermalSlowdown: "software thermal slowdown",
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hardware thermal slowdown",
        pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "hardware power brake",
        pynvml.nvmlClocksEventReasonDisplayClockSetting: "display clocks",
    } == THROTTLE_REASONS
