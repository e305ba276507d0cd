"""The options that `generate` and `chat` share; sampling_params.py and input.py have the ranges."""

from __future__ import annotations

from typing import Annotated

import typer

PANEL = "Sampling"
DEFAULT_MAX_TOKENS = 256

Target = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="ask this server instead of loading the model into this process"
    ),
]
Priority = Annotated[
    int,
    typer.Option(metavar="N", help="class at the --target: 0 is the most urgent, 9 the least"),
]
Tenant = Annotated[
    str, typer.Option(metavar="NAME", help="whose request it is, to the --target; default: nobody")
]
MaxTokens = Annotated[
    int, typer.Option(metavar="TOKENS", rich_help_panel=PANEL, help="length of an answer, at most")
]
Temperature = Annotated[
    float,
    typer.Option(metavar="NUMBER", rich_help_panel=PANEL, help="0 takes the likeliest"),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="NUMBER",
        rich_help_panel=PANEL,
        help="keep the likeliest that hold this probability",
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", rich_help_panel=PANEL, help="keep this many of the likeliest; 0: all"
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="NUMBER",
        rich_help_panel=PANEL,
        help="keep tokens at least this times as likely as the likeliest",
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="NUMBER", rich_help_panel=PANEL, help="above 1 repeats less")
]
# --seed is the engine's setting: it fixes the seeds that are drawn for requests without one.
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", rich_help_panel=PANEL, help="end before this; may be repeated"),
]
