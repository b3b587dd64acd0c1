"""Measure memory, latency and quality of checkpoints against their reference."""

from bench.run.run import bench

__all__ = ["bench"]
