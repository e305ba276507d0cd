"""`millrace doctor`: what this machine can run, and what a server here would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from millrace.engine.config import EngineConfig

if TYPE_CHECKING:
    from millrace.engine.cli.checks import Check

MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}


def doctor(config: EngineConfig) -> None:
    """Check this machine, the model (which is fetched if need be) and the room for its KV cache.

    Ends with exit code 1 if something that a server needs is missing.
    """
    from millrace.engine.cli.checks import all_checks

    checks = all_checks(config)
    Console().print(report(checks))
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


def report(checks: list[Check]) -> Table:
    """The checks as a table; a mark says passed, failed or merely a fact."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark, colour = MARKS[check.passed]
        table.add_row(f"[{colour}]{mark}[/]", check.name, check.found)
    return table
