"""The process in which one chat template runs: `python -m millrace.engine.text.template_worker`.

A template comes with the model and is a program: it can loop without end, or build 10 GB from one
multiplication inside a single C call. No check within the same process stops all of that, so it
runs here, where the kernel ends it: SIGPROF when its CPU time is up, MemoryError at the limit of
its address space. Jinja's sandbox is still between the template and Python.

Speaks JSON lines with template_process.py: first a TemplateSetup, answered with {} or an error;
then the variables of one rendering a line, each answered with one of {"text"}, {"refusal"},
{"error", "line"} and {"too_long"}. Imports little, since it starts with every server.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Refusal(jinja2.TemplateError):
    """The template called raise_exception: it does not take these messages."""


class GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class TemplateNamespace(Namespace):
    """`namespace()` without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a template may use `self` as a name
        Namespace.__init__(self, *rest, **kwargs)
        for name in dict(*rest, **kwargs):
            TemplateNamespace._check(name)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


def raise_exception(message: str) -> None:
    raise Refusal(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str) -> jinja2.Template:
    """`source` in the environment that transformers' apply_chat_template gives a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": TemplateNamespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # not the class and what it leads to
    }
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """The answer to one request; stops as soon as the text is longer than `max_bytes` of UTF-8."""
    chunks: list[str] = []
    size = 0
    for chunk in template.generate(variables):
        chunks.append(chunk)
        size += len(chunk.encode("utf-8", errors="surrogatepass"))
        if size > max_bytes:
            return {"too_long": size}
    return {"text": "".join(chunks)}


def answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, or its failure as an answer."""
    try:
        return work()
    except Refusal as error:
        return {"refusal": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than it may have", "line": None}
    except Exception as error:  # a template can raise whatever Python can
        return {"error": f"{type(error).__name__}: {error}", "line": _line(error)}


def _line(error: Exception) -> int | None:
    """The line of the template at fault; jinja2 writes it into the traceback."""
    line: int | None = getattr(error, "lineno", None)
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer line by line until the parent closes the pipe, or is gone."""
    setup = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def exchange(work: Callable[[], dict[str, Any]]) -> None:
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])  # SIGPROF's default is to terminate
        answers.write(json.dumps(answer(work)).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0.0)

    template: jinja2.Template

    def compile_first() -> dict[str, Any]:
        nonlocal template
        template = compile_template(setup["source"])
        return {}

    exchange(compile_first)
    for line in requests:
        variables = setup["variables"] | json.loads(line)
        exchange(partial(render, template, variables, setup["max_bytes"]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    serve(sys.stdin.buffer, sys.stdout.buffer)
