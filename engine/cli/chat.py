"""`millrace chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from millrace.engine.cli.generate import show
from millrace.engine.cli.sampling import (
    DEFAULT_MAX_TOKENS,
    MaxTokens,
    MinP,
    Priority,
    RepetitionPenalty,
    Stop,
    Target,
    Temperature,
    Tenant,
    TopK,
    TopP,
)
from millrace.engine.cli.source import Source, open_source
from millrace.engine.cli.text_stream import ChatTurn
from millrace.engine.config import EngineConfig
from millrace.engine.errors import InvalidRequest, TemplateError
from millrace.engine.sampling_params import SamplingParams

System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="what the model is told before the first turn")
]
HINT = "/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D leaves"


def chat(
    config: EngineConfig,
    target: Target = None,
    priority: Priority = 0,
    tenant: Tenant = "",
    system: System = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
) -> None:
    """Talk with the model. It is told the whole conversation at each turn."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or [],
        seed=config.seed,
    )
    source = open_source(config, target, priority, tenant)
    start: list[ChatTurn] = [("system", system)] if system else []
    Console().print(f"{source.name}: {HINT}", style="dim", highlight=False)
    _talk(source, start, params)


def _talk(source: Source, start: list[ChatTurn], params: SamplingParams) -> None:
    """Read turns until the input ends. A turn that is refused leaves the conversation as it was."""
    console = Console()
    history = list(start)
    while (line := _read(console)) is not None:
        if line == "/reset":
            history = list(start)
        elif line:
            turns = [*history, ("user", line)]
            try:
                _, answer = show(source, turns, params)
            except (InvalidRequest, TemplateError) as error:
                console.print(f"{error}", style="red", highlight=False, markup=False)
                continue
            history = [*turns, ("assistant", answer)]


def _read(console: Console) -> str | None:
    """The next line, "" after Ctrl-C, None at the end of the input."""
    try:
        return console.input("[bold green]> [/]").strip()
    except KeyboardInterrupt:
        console.print()
        return ""
    except EOFError:
        console.print()
        return None
