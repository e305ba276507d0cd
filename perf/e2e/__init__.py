"""End to end on a GPU: the parts of the suite that run the engine, not a kernel."""
