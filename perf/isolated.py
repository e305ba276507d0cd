"""Run a function in a process of its own, with a limit to its time.

A kernel that reads a bad address ends the device's context for its whole process, and one that
hangs holds it: so nothing that must go on shares a process with a kernel under test. The process is
forked, which saves each one the imports; hence the parent must never touch the device itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence


def run_isolated(work: Callable[[], None], limit_s: float) -> str:
    """Why it failed: "" after success. At the limit the process and its children are killed."""
    process = multiprocessing.get_context("fork").Process(target=_guarded, args=(work,))
    sys.stdout.flush()
    process.start()
    try:
        process.join(limit_s)
        ended = process.exitcode is not None
    finally:  # also when the parent is interrupted
        if process.is_alive():
            assert process.pid is not None, "it has started"
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if not ended:
        return f"killed after {limit_s:.0f} s"
    assert process.exitcode is not None, "it has ended"
    if process.exitcode < 0:
        return f"ended by {signal.Signals(-process.exitcode).name}"
    return f"exit code {process.exitcode}" if process.exitcode else ""


def run_together(works: Sequence[Callable[[], None]]) -> None:
    """Each in a process of its own, at the same time; how they end is nobody's concern.

    Called within `run_isolated`, whose limit ends them too.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _guarded(work: Callable[[], None]) -> None:
    """In the child: a group of its own, so that its children can be ended with it."""
    os.setpgrp()
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # a broken device context can hang in the destructors
