"""Quantize a causal language model and load the result."""
