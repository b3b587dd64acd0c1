"""Quantize a causal language model, measure what each variant costs, show it: the Python interface.

    made = quantable.quantize("org/name", "awq-gemm", "runs", group_size=64)
    outcome = quantable.bench("runs", rounds=2)
    print(quantable.report("runs"))

Importing this imports no torch; what needs it does, when it is first used.
"""

from typing import TYPE_CHECKING

from quantize import versions
from quantize.errors import UserError
from quantize.lazy import lazily
from quantize.variant import VARIANTS

if TYPE_CHECKING:
    from bench.compare import compare_files
    from bench.run.run import bench
    from bench.worker.options import BenchOptions
    from quantize.building.build import quantize
    from quantize.building.job import BuildOptions
    from quantize.checkpoint import open_checkpoint, verify
    from quantize.loader import load
    from reports.api import report
    from reports.choose import choose

__all__ = [
    "VARIANTS", "BenchOptions", "BuildOptions", "UserError", "bench", "choose", "compare_files", "load",
    "open_checkpoint", "quantize", "report", "verify",
]  # fmt: skip
__version__ = versions.VERSION

BENCH = {"bench.worker.options": ("BenchOptions",), "bench.run.run": ("bench",), "bench.compare": ("compare_files",)}
BUILDING = {"quantize.building.build": ("quantize",), "quantize.building.job": ("BuildOptions",)}
CHECKPOINTS = {"quantize.checkpoint": ("open_checkpoint", "verify"), "quantize.loader": ("load",)}
REPORTS = {"reports.api": ("report",), "reports.choose": ("choose",)}
__getattr__ = lazily(__name__, {**BENCH, **BUILDING, **CHECKPOINTS, **REPORTS})
