"""Continuous batching as a library: pure Python and NumPy, no torch, no engine, no kernels."""
