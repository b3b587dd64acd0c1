"""This process's own memory: what it holds, the most it held, giving back what it no longer needs. Imports no torch."""

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

PROC = Path("/proc/self")


def status_bytes(field: str, proc: Path = PROC) -> int | None:
    """A size in Linux's /proc/self/status, such as VmRSS (held now) or VmHWM (the peak); None elsewhere."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}:\s+(\d+) kB$", (proc / "status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None


def resident_bytes(proc: Path = PROC) -> int:
    if (held := status_bytes("VmRSS", proc)) is not None:
        return held
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes(proc: Path = PROC) -> int:
    """The largest resident set size of this process so far.

    Linux's own count in /proc comes first: `getrusage` passes the size of the process that started this one on to it.
    """
    if (peak := status_bytes("VmHWM", proc)) is not None:
        return peak
    import resource  # Windows has none, and imports this module too

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No search for reference cycles inside the block, which makes many objects that stay: it would walk them all."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; fordblks is how many bytes of the heap are free."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names]


def trim_memory(*, above: float = 0.0) -> None:
    """Have the C library return freed pages to the system, where it can: kept ones count as this process's memory.

    above: leave them while they are at most this share of the resident memory; pages cost time to get again."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library, an older one
        library = ctypes.CDLL("libc.so.6")
        if above:
            library.mallinfo2.restype = _MallocInfo
            if library.mallinfo2().fordblks <= above * resident_bytes():
                return
        library.malloc_trim(0)
