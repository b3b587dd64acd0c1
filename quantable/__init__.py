"""Quantize a causal language model, measure what each variant costs, show it: the Python interface.

    made = quantable.quantize("org/name", "awq-gemm", "runs", group_size=64)
    outcome = quantable.bench("runs", rounds=2)
    print(quantable.report("runs"))

Importing this imports no torch; what needs it does, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.run.options import BenchOptions
    from bench.run.run import Outcome, bench
    from quantize.building.build import quantize
    from quantize.building.job import BuildOptions, BuiltCheckpoint
    from quantize.checkpoint import Checkpoint, find_checkpoints, open_checkpoint, verify
    from quantize.errors import UserError
    from quantize.loader import LoadedModel, load
    from quantize.variant import VARIANTS, Variant
    from reports.api import report

HOMES = {
    "bench.run.options": ("BenchOptions",),
    "bench.run.run": ("Outcome", "bench"),
    "quantize.building.build": ("quantize",),
    "quantize.building.job": ("BuildOptions", "BuiltCheckpoint"),
    "quantize.checkpoint": ("Checkpoint", "find_checkpoints", "open_checkpoint", "verify"),
    "quantize.errors": ("UserError",),
    "quantize.loader": ("LoadedModel", "load"),
    "quantize.variant": ("VARIANTS", "Variant"),
    "reports.api": ("report",),
}
"""Module -> what of it is public."""

__all__ = [
    "VARIANTS", "BenchOptions", "BuildOptions", "BuiltCheckpoint", "Checkpoint", "LoadedModel", "Outcome", "UserError",
    "Variant", "bench", "find_checkpoints", "load", "open_checkpoint", "quantize", "report", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from quantize.versions import version_of

        return version_of("quantable")
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
