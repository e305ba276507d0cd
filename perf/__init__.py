"""Measurements: a load generator, the benchmark behind `millrace bench`, and the demo."""
