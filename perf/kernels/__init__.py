"""Benchmarks of the kernels: a case a shape, peers in the same run, shares of measured ceilings."""
