"""`python -m millrace.engine.core`: the engine core's own process, as `process.py` starts it."""

from millrace.engine.core.loop import serve
from millrace.engine.core.process import run_core

if __name__ == "__main__":
    run_core(serve)
