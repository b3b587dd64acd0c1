"""Measure memory, latency and quality of checkpoints against their reference: `bench.bench(...)`."""

from typing import TYPE_CHECKING

from quantize.lazy import lazily

if TYPE_CHECKING:
    from bench.run.run import bench

__all__ = ["bench"]

__getattr__ = lazily(__name__, {"bench.run.run": __all__})
