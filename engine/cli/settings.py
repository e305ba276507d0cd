"""Options from EngineConfig's fields: name, type, default, unit and help come from the field.

A command takes `config: EngineConfig`; `with_settings` replaces that one parameter by an option for
each setting and `--config FILE`. An option that is not given is None here, so that the environment
and the file can say it (`load_config` has the order).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Set
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from millrace.engine.config import ENV_PREFIX, EngineConfig, load_config

PANEL = "Settings"
CONFIG_FILE = typer.Option(
    "--config",
    metavar="FILE",
    rich_help_panel=PANEL,
    help=f"YAML file of these settings; {ENV_PREFIX}PORT and the like in the environment beat it, "
    "options beat both",
)
KEYWORD = inspect.Parameter.KEYWORD_ONLY
LISTENING = frozenset({"host", "port", "http_port", "drain_timeout_s", "default_timeout_s"})
"""Settings that mean nothing to a command that does not listen."""


def with_settings(
    command: Callable[..., None], omit: Set[str] = frozenset()
) -> Callable[..., None]:
    """Return `command` with its `config` parameter spelled out as options, but for those in `omit`.

    For typer, which reads signatures.
    """
    fields = [field for field in dataclasses.fields(EngineConfig) if field.name not in omit]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        settings = {field.name: options.pop(field.name) for field in fields}
        command(config=load_config(settings, options.pop("config_file")), **options)

    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=KEYWORD)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "config"
    ]
    parameters = [*own, _config_file(), *(_parameter(field) for field in fields)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # typer would look through to `command`
    return run


def flag(name: str) -> str:
    """The option of a setting: --max-running for max_running."""
    return "--" + name.replace("_", "-")


def _config_file() -> inspect.Parameter:
    annotation = Annotated[Path | None, CONFIG_FILE]
    return inspect.Parameter("config_file", KEYWORD, default=None, annotation=annotation)


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """One setting as a parameter whose default, None, means that it was not given."""
    kind = get_type_hints(EngineConfig)[field.name]
    if field.name == "tenant_weights":
        kind = str  # `load_config` reads it
    names = flag(field.name)
    if kind is bool:
        names += f"/--no-{names.removeprefix('--')}"
    option = typer.Option(
        names,
        help=escape(_help(field)),
        metavar=None if kind is bool else _metavar(field, kind),
        rich_help_panel=PANEL,
    )
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(field.name, KEYWORD, default=None, annotation=annotation)


def _help(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    if field.default is None:
        return text  # it says what None means
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"{text} [default: {default}]"


def _metavar(field: dataclasses.Field[Any], kind: Any) -> str:
    """The unit, where the setting has one, else the type."""
    unit: str = field.metadata["unit"]
    names = {"s": "SECONDS"}
    if unit:
        return names.get(unit, unit.upper())
    if field.type.startswith("int"):
        return "N"
    return "NUMBER" if field.type.startswith("float") else "TEXT"
