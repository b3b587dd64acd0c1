"""Measure memory, latency and quality of checkpoints against their reference."""
