"""Looks at the machine: its fingerprint, and what a copy and a matrix product take on it."""

import contextlib
import functools
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.records.environment import LIBRARIES, Environment, SourceState
from bench.worker.clock import Clock, clock_for, seconds_of_each
from bench.worker.gpu import cuda_uuid, open_nvml
from quantize.versions import version_of

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # how much `copy_probe` copies at once: far more than any cache holds


def fingerprint(device_type: str) -> Environment:
    """What is known of machine, libraries and source, without the probes of speed; "cuda" makes a context here."""
    import torch

    gpu: dict[str, Any] = {}
    if device_type == "cuda":
        card, nvml = torch.cuda.get_device_properties(torch.cuda.current_device()), open_nvml(cuda_uuid())
        gpu = {"gpu": card.name, "gpu_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
        gpu["gpu_driver"] = nvml.driver() if nvml else None
    return Environment(
        cpu=cpu_model_name(),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        python=platform.python_version(),
        libraries={name: version_of(name) for name in LIBRARIES},
        source=source_state(Path(__file__).resolve().parents[2]),
        **gpu,
    )


def cpu_model_name() -> str | None:
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or None


def source_state(root: Path) -> SourceState:
    """Version of this program; commit and whether files differ from it, where `root` is itself a git tree."""
    command, told = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], ""
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    commit, dirty, _ = told.partition("-dirty")
    return SourceState(version_of("quantable"), commit or None, bool(dirty) if commit else None)


def copy_probe(device_type: str, repeats: int = 11) -> float | None:
    """Bytes a second, read and written, of a plain copy on the device; None on a GPU without room for two buffers."""
    import torch

    size = COPY_BYTES[device_type]
    if device_type == "cuda" and torch.cuda.mem_get_info()[0] < 3 * size:
        return None
    source = torch.ones(size // 4, dtype=torch.float32, device=device_type)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = seconds_of_each([lambda: target.copy_(source)] * repeats, clock_for(device_type))
    return 2 * size / statistics.median(seconds)


def matmul_probe(repeats: int = 5) -> dict[str, float]:
    """Median seconds of [256, 2048] times [2048, 2048] on the CPU by dtype name, taking turns after a warm-up."""
    import torch

    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        products[str(dtype).removeprefix("torch.")] = functools.partial(torch.matmul, x, weight.T)
    with torch.no_grad():
        turns = [seconds_of_each(list(products.values()), Clock()) for _ in range(repeats + 1)]
    return dict(zip(products, map(statistics.median, zip(*turns[1:], strict=True)), strict=True))


def cpu_compute_dtype(probe: Mapping[str, float]) -> str:
    """float32, unless bfloat16 is clearly faster: where its matrix product takes at most 0.8 of float32's time."""
    return "bfloat16" if probe["bfloat16"] <= 0.8 * probe["float32"] else "float32"
