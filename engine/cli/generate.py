"""`millrace generate`: complete one prompt, streamed to the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

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
from millrace.engine.cli.text_stream import TextOrChat, TextStream, interrupt_cancels
from millrace.engine.config import EngineConfig
from millrace.engine.sampling_params import SamplingParams

Prompt = Annotated[str, typer.Argument(help="text to go on from; - reads standard input")]


def generate(
    config: EngineConfig,
    prompt: Prompt,
    target: Target = None,
    priority: Priority = 0,
    tenant: Tenant = "",
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
) -> None:
    """Complete PROMPT and stream the text to the terminal. Ctrl-C ends the text."""
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
    text = sys.stdin.read() if prompt == "-" else prompt
    stream, _ = show(open_source(config, target, priority, tenant), text, params)
    if stream.usage is not None:
        Console(stderr=True).print(str(stream.usage), style="dim", highlight=False)


def show(source: Source, prompt: TextOrChat, params: SamplingParams) -> tuple[TextStream, str]:
    """Stream one answer to standard output; Ctrl-C cancels it. Returns it and its whole text."""
    stream = source.stream(prompt, params)
    pieces = []
    with interrupt_cancels(stream):
        for piece in stream:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return stream, "".join(pieces)
