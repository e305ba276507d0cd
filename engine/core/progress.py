"""What a starting core is at: bars on stderr, or a line a stage in the log if nobody watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)


@contextmanager
def startup_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callable of what was just done, how many of, how many; a stage begins at 1."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    is_watched = sys.stderr.isatty()
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not is_watched
    ) as bars:
        task = bars.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            nonlocal task
            if done == 1:
                bars.remove_task(task)
                task = bars.add_task(what, total=total)
            bars.update(task, description=what, completed=done)
            if done == total and not is_watched:
                log.info("%s: %d of %d", what, done, total)

        yield report
