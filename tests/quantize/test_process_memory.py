"""What a process holds, and giving back what it freed; in processes of their own, whose memory is nobody else's."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantize.process_memory import peak_resident_bytes, resident_bytes

ROOT = Path(__file__).parents[2]
GLIBC = pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
FREE_FRAGMENTS = """
from quantize.process_memory import trim_memory, resident_bytes
kept = [bytearray(60_000) for _ in range(5000)]
del kept[:-1]  # the last one pins the top of the heap
before = resident_bytes()
trim_memory(above={above})
print(before - resident_bytes())
"""


def printed(code: str) -> int:
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ran.stdout)


def test_the_peak_is_at_least_what_is_held() -> None:
    assert 10**7 < resident_bytes() <= peak_resident_bytes()


def test_without_linux_proc_the_figures_are_much_the_same(tmp_path: Path) -> None:
    assert 0.8 < resident_bytes(tmp_path) / resident_bytes() < 1.25
    assert peak_resident_bytes(tmp_path) >= 0.95 * peak_resident_bytes()


@GLIBC
@pytest.mark.parametrize(("above", "fewest", "most"), [(0.0, 25e7, 4e8), (0.2, 25e7, 4e8), (0.99, -1e6, 1e6)])
def test_freed_memory_is_given_back_when_it_is_much(above: float, fewest: float, most: float) -> None:
    assert fewest <= printed(FREE_FRAGMENTS.format(above=above)) <= most
