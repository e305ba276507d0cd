"""The commands under one roof, and the one place where errors become lines and exit codes."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from millrace.engine.cli.bench import bench
from millrace.engine.cli.chat import chat
from millrace.engine.cli.compile import compile
from millrace.engine.cli.doctor import doctor
from millrace.engine.cli.generate import generate
from millrace.engine.cli.plan import UNUSED, plan
from millrace.engine.cli.serve import serve
from millrace.engine.cli.settings import LISTENING, with_settings
from millrace.engine.cli.tokenize import tokenize
from millrace.engine.errors import InvalidRequest, MillraceError

EXIT_FAILED, EXIT_USAGE = 1, 2


class Commands(TyperGroup):
    """Ends a command that raises a MillraceError with one clear line and no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MillraceError as error:
            Console(stderr=True, soft_wrap=True).print(Text(f"millrace: {error}", style="red"))
            usage = isinstance(error, InvalidRequest)
            raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED) from error


app = typer.Typer(
    name="millrace",
    cls=Commands,
    help="High-throughput, batched LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(with_settings(serve))
app.command()(with_settings(generate, omit=LISTENING))
app.command()(with_settings(chat, omit=LISTENING))
app.command()(tokenize)
app.command()(with_settings(bench, omit=LISTENING))
app.command()(with_settings(plan, omit=LISTENING | UNUSED))
app.command()(with_settings(doctor, omit=LISTENING))
app.command()(with_settings(compile, omit=LISTENING))


def main() -> None:
    """Entry point of `millrace`."""
    app()
