"""Memory of this process and its model, in bytes; None for what cannot be told. Imports torch when used."""

import gc
from pathlib import Path

from quantize.process_memory import PROC, resident_bytes, status_bytes, trim_memory


class RssView:
    """Resident set size of the process, from Linux's /proc; elsewhere psutil gives the current size alone.

    The peak is reset by writing 5 to clear_refs; where that is forbidden, it is known only if it is the highest so far.
    """

    source = "RSS"

    def __init__(self, proc: Path = PROC) -> None:
        self._proc, self._older_peak_bytes = proc, 0

    def reset_peak(self) -> None:
        """Give back what is held without need and start a new peak from what is left."""
        gc.collect()
        trim_memory()
        try:
            (self._proc / "clear_refs").write_text("5")
            self._older_peak_bytes = 0
        except OSError:
            self._older_peak_bytes = status_bytes("VmHWM", self._proc) or 0

    def current_bytes(self) -> int | None:
        return resident_bytes(self._proc)

    def peak_bytes(self) -> int | None:
        """The most that was held since `reset_peak`."""
        peak = status_bytes("VmHWM", self._proc)
        return None if peak is None or peak <= self._older_peak_bytes else peak

    def reserved_peak_bytes(self) -> int | None:
        """The most that an allocator took from the device, None where there is no such thing."""
        return None


class CudaAllocatorView:
    """The same of what torch's allocator has handed out on the current CUDA device; no context, no cached blocks."""

    source = "CUDA allocator"

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def reset_peak(self) -> None:
        gc.collect()
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats()

    def current_bytes(self) -> int:
        return self._cuda.memory_allocated()

    def peak_bytes(self) -> int:
        return self._cuda.max_memory_allocated()

    def reserved_peak_bytes(self) -> int:
        return self._cuda.max_memory_reserved()


MemoryView = RssView | CudaAllocatorView


def memory_view(device_type: str) -> MemoryView:
    """The view that means something on this device type ("cpu" or "cuda")."""
    return CudaAllocatorView() if device_type == "cuda" else RssView()
