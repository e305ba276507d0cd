"""`millrace compile`: fill Triton's cache, so that a server that starts later compiles nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from millrace.engine.config import EngineConfig
from millrace.engine.errors import InvalidRequest

TARGET = typer.Option(help="compile for this family (sm_90, ...) without such a device")


def compile(config: EngineConfig, target: Annotated[str | None, TARGET] = None) -> None:
    """Compile the kernels that this model launches on this GPU, and say where they are kept.

    It starts an engine as `serve` would, which launches each kernel. Triton's keys hold no GPU, no
    driver and no path: the folder serves every machine with such a GPU, this model, these settings
    and the same Millrace and Triton. Copy it there and name it in TRITON_CACHE_DIR.

    With --target it compiles the signatures of `python -m millrace.kernels.aot` instead, for a GPU
    that is not here: a check that all kernels compile. A launch of such a signature finds what was
    compiled. But those are samples: launch configurations go by the device's name, and strides by
    the model, so that a first start on that GPU still has to compile.
    """
    import torch
    import triton

    if target is not None:
        count = _ahead_of_time(target)
    elif torch.cuda.is_available():
        count = _by_starting(config)
    else:
        raise InvalidRequest("there is no GPU here; name one with --target", "target", "sm_90, ...")
    print(f"{count} kernels compiled into {triton.knobs.cache.dir}")


def _ahead_of_time(target: str) -> int:
    from millrace.kernels.aot import SPECS, TARGETS, compile_spec

    if target not in TARGETS:
        known = ", ".join(TARGETS)
        raise InvalidRequest(f"--target must be one of {known}, got {target!r}", "target", known)
    specs = [spec for spec in SPECS if target in spec.targets]
    with typer.progressbar(specs, item_show_func=lambda spec: spec.name if spec else "") as bar:
        for spec in bar:
            compile_spec(spec, TARGETS[target])
    return len(specs)


def _by_starting(config: EngineConfig) -> int:
    """Start and drop an engine; counts what was compiled meanwhile, not what the cache had."""
    import triton

    from millrace.engine.core.build import build_core
    from millrace.engine.core.progress import startup_progress
    from millrace.engine.weights.locate import resolve

    count = 0

    def listen(*, cache_hit: bool, **_: object) -> None:
        nonlocal count
        count += not cache_hit

    location = resolve(config.model, config.revision)
    with triton.knobs.compilation.scope(), startup_progress() as progress:
        triton.knobs.compilation.listener = listen
        build_core(config, location, progress)
    return count
