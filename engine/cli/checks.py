"""The checks of `millrace doctor`. Each finds one thing out and never raises."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import resolve_placement
from millrace.engine.errors import MillraceError
from millrace.engine.models.registry import ModelConfig, model_config
from millrace.engine.runner.memory import available_memory, kv_blocks
from millrace.engine.runner.sizes import sizes_for
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.engine.weights.locate import resolve

GIB = 2**30
MIB = 2**20
MIN_PYTHON = (3, 11)
CHAT_TOKENS = 1024  # one conversation, for "how many fit"
LIBRARIES = ("millrace", "numpy", "tokenizers", "grpcio", "protobuf")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `passed` is None for a fact that is neither good nor bad."""

    name: str
    found: str
    passed: bool | None = None


def all_checks(config: EngineConfig) -> list[Check]:
    """The machine, then the model; what needs the model is left out where there is none."""
    checks = [python(), libraries(), pytorch(), triton(), cpu(), memory(), gpus()]
    checks.append(_guarded("runs on", lambda: placement(config)))
    return checks + model_checks(config)


def python() -> Check:
    found = f"{platform.python_version()} on {platform.platform()}"
    return Check("python", found, sys.version_info >= MIN_PYTHON)


def libraries() -> Check:
    return Check("libraries", ", ".join(f"{name} {version(name)}" for name in LIBRARIES), True)


def pytorch() -> Check:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"
    return Check("torch", f"{torch.__version__}{cuda}", True)


def triton() -> Check:
    try:
        return Check("triton", version("triton"), True)
    except PackageNotFoundError:
        return Check("triton", "not installed: the torch kernels run instead")


def cpu() -> Check:
    """Cores and the instructions that decide about the dtype."""
    features = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    known = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in features.items())
    usable = len(os.sched_getaffinity(0))
    return Check("cpu", f"{usable} usable, {torch.get_num_threads()} torch threads; {known}")


def memory() -> Check:
    return Check("memory", f"{available_memory() / GIB:.1f} GiB available")


def gpus() -> Check:
    if not torch.cuda.is_available():
        return Check("gpu", "none")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = (f"{c.name}, {c.total_memory / GIB:.0f} GiB, sm_{c.major}{c.minor}" for c in cards)
    return Check("gpu", "; ".join(found), True)


def placement(config: EngineConfig) -> Check:
    """What "auto" becomes here."""
    chosen = resolve_placement(config)
    dtype = str(chosen.dtype).removeprefix("torch.")
    return Check("runs on", f"{chosen.device}, {dtype}, {chosen.operations.name} kernels", True)


def model_checks(config: EngineConfig) -> list[Check]:
    """The model on disk and the KV cache that it would get."""
    try:
        location = resolve(config.model, config.revision)
        checkpoint = open_checkpoint(location.path)
        model = model_config(checkpoint.config, checkpoint.generation_config)
    except MillraceError as error:
        return [Check("model", str(error), False)]
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    found = (
        f"{location.name}: {model.architecture}, {parameters / 1e6:.0f} M parameters, "
        f"context {model.max_context} tokens"
    )
    where = f"{location.path} ({_size(location.path) / MIB:.0f} MiB)"
    return [
        Check("model", found, True),
        Check("model files", where, True),
        _guarded("kv cache", lambda: kv_cache(config, model, parameters)),
    ]


def kv_cache(config: EngineConfig, model: ModelConfig, parameters: int) -> Check:
    """How much context fits. An estimate on a GPU, where the weights are not loaded yet."""
    chosen = resolve_placement(config)
    blocks = kv_blocks(config, model, chosen.dtype, chosen.device)
    token_bytes = model.kv_elements_per_token * chosen.dtype.itemsize
    if chosen.device.type == "cuda" and config.kv_cache_memory is None:
        weights = parameters * chosen.dtype.itemsize
        blocks = max(0, blocks - weights // (token_bytes * config.block_size))
    tokens = blocks * config.block_size
    most = sizes_for(config, chosen.device).max_running
    found = (
        f"{blocks} blocks of {config.block_size} = {tokens} tokens "
        f"({tokens * token_bytes / MIB:.0f} MiB), {tokens // CHAT_TOKENS} contexts of "
        f"{CHAT_TOKENS} tokens, {min(most, blocks)} requests at once at most"
    )
    return Check("kv cache", found, blocks > 0)


def _size(path: Path) -> int:
    """Bytes of a model's file, or of the files in its folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except MillraceError as error:
        return Check(name, str(error), False)
