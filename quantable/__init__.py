"""Quantize a causal language model, measure what each variant costs, show it: the Python interface.

    made = quantable.quantize("org/name", "awq-gemm", "runs", group_size=64)
    outcome = quantable.bench("runs", rounds=2)
    print(quantable.report("runs"))

Importing this imports no torch; what needs it does, when it is first used.
"""

from typing import TYPE_CHECKING

from quantize import VARIANTS, UserError, versions
from quantize.lazy import lazily

if TYPE_CHECKING:
    from bench import bench
    from bench.compare import compare_files
    from bench.worker.options import BenchOptions
    from quantize import BuildOptions, load, quantize
    from quantize.checkpoint import open_checkpoint, verify
    from reports import report
    from reports.choose import choose

__all__ = [
    "VARIANTS", "BenchOptions", "BuildOptions", "UserError", "bench", "choose", "compare_files", "load",
    "open_checkpoint", "quantize", "report", "verify",
]  # fmt: skip
__version__ = versions.VERSION

QUANTIZE = {"quantize": ("BuildOptions", "load", "quantize"), "quantize.checkpoint": ("open_checkpoint", "verify")}
BENCH = {"bench": ("bench",), "bench.worker.options": ("BenchOptions",), "bench.compare": ("compare_files",)}
__getattr__ = lazily(__name__, {**QUANTIZE, **BENCH, "reports": ("report",), "reports.choose": ("choose",)})
