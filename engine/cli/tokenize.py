"""`millrace tokenize`: what a model's tokenizer makes of a text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from millrace.engine.config import load_config

if TYPE_CHECKING:
    from millrace.engine.text.vocabulary import Tokenizer

STYLES = ("black on bright_cyan", "black on bright_yellow")  # of neighbours
ID_STYLE = "dim"
Given = Annotated[str, typer.Argument(metavar="TEXT", help="text; - reads standard input")]
Model = Annotated[
    str | None, typer.Option(metavar="TEXT", help="as in `serve`; built-in model if unset")
]
Revision = Annotated[
    str | None, typer.Option(metavar="TEXT", help="branch, tag or commit of a hub model")
]
AddSpecial = Annotated[
    bool, typer.Option(help="begin with the model's beginning-of-sequence token, if it has one")
]


def tokenize(
    text: Given, model: Model = None, revision: Revision = None, add_special: AddSpecial = True
) -> None:
    """Show each token of TEXT with its id. Without a terminal: one token a line, id first."""
    from millrace.engine.text.tokenizer import load_tokenizer
    from millrace.engine.weights.locate import resolve

    config = load_config({"model": model, "revision": revision})
    tokenizer = load_tokenizer(resolve(config.model, config.revision))
    given = sys.stdin.read() if text == "-" else text
    ids = tokenizer.encode(given, add_special=add_special)
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(coloured(tokenizer, ids))
        console.print(f"{len(ids)} tokens, {len(given)} characters", style=ID_STYLE)
        return
    for token_id in ids:
        print(f"{token_id}\t{_spelling(tokenizer, token_id)!r}")


def coloured(tokenizer: Tokenizer, ids: list[int]) -> Text:
    """The tokens in alternating colours, each followed by its id."""
    text = Text()
    for index, token_id in enumerate(ids):
        shown = _spelling(tokenizer, token_id).replace("\n", "⏎\n").replace("\t", "⇥\t")
        text.append(shown, style=STYLES[index % len(STYLES)])
        text.append(f"{token_id} ", style=ID_STYLE)
    return text


def _spelling(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text, control tokens included; "\\xf0" for a byte of a part of a character."""
    return tokenizer.text_bytes((token_id,), skip_special=False).decode(errors="backslashreplace")
