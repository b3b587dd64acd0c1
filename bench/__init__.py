"""Measure memory, latency and quality of checkpoints against their reference: `bench.bench(...)`.

Importing the package imports no torch, and nothing of the run; the function does, when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.run.options import BenchOptions
    from bench.run.run import Outcome, bench

__all__ = ["BenchOptions", "Outcome", "bench"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bench.run import run

    return getattr(run, name)
