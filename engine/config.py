"""EngineConfig: every setting of a server or of an offline LLM, checked once and never mutated.

The same fields come from flags, from MILLRACE_* environment variables and from a YAML file
(`--config`); a flag beats the environment, which beats the file. The field's metadata carries its
unit and its one line of help, so that the CLI, the docs and the errors can't drift apart.
Limits that are not settings are the named constants below.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from millrace.engine.errors import InvalidRequest

MAX_MESSAGE_BYTES = 16 * 2**20  # one gRPC message, either way
MAX_PROMPT_BYTES = 8 * 2**20  # of text, before tokenizing
MAX_REQUEST_ID_BYTES = 256
MAX_PRIORITY = 9  # the least urgent class; 0 is the most urgent
TENANT_LIMIT = "1 to 64 of A-Z a-z 0-9 . _ : @ / -"
TENANT = re.compile(r"[A-Za-z0-9._:@/-]{1,64}")
WEIGHTS = (0.001, 1000.0)  # of tenants, the least and the greatest
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION_BACKENDS = ("auto", "torch", "triton", "xformers", "reference")
POLICIES = ("first_come", "priority", "fair_share", "deadline")
ENV_PREFIX = "MILLRACE_"


def setting(default: Any, help: str, unit: str = "") -> Any:
    """A config field with its help and unit."""
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All settings; `None` and "auto" are resolved by the part that owns them, and logged."""

    model: str | None = setting(
        None, "built-in SmolLM2-135M-Instruct if unset; else a folder, a .gguf file or a hub id"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    served_name: str | None = setting(None, "name reported to clients; default: the model's own")
    device: str = setting("auto", "cpu, cuda, cuda:N; auto takes a GPU where there is one")
    dtype: str = setting(
        "auto", "of weights and KV: auto, float32 (exact on CPU), bfloat16 or float16"
    )
    attention_backend: str = setting(
        "auto", "kernels to run: auto, torch, triton, xformers or reference"
    )
    deterministic: bool = setting(
        False, "the same logits to the bit whatever the batch, chunks and cache hits; costs speed"
    )
    threads: int | None = setting(None, "CPU threads of the engine; default: physical cores")
    max_context: int | None = setting(None, "prompt and output; default: the model's", "tokens")
    max_running: int | None = setting(
        None, "requests in a batch at once; default: 256 on a GPU, else 64"
    )
    max_waiting: int = setting(4096, "requests in the queue; beyond, new ones are refused")
    max_waiting_tokens: int = setting(4_000_000, "prompt tokens in the queue", "tokens")
    max_step_tokens: int | None = setting(
        None,
        "computed in one step, prefill chunks included; default: 8192 on a GPU with room, else 512",
        "tokens",
    )
    max_wait_s: float | None = setting(
        None, "expected wait beyond which new requests are refused; default: any", "s"
    )
    policy: str = setting("first_come", "who is next: first_come, priority, fair_share or deadline")
    tenant_weights: Mapping[str, float] | None = setting(
        None, "shares of the fair_share policy, as NAME=WEIGHT,NAME=WEIGHT; default: 1 each"
    )
    priority_aging_s: float = setting(10.0, "wait that is worth one class of priority", "s")
    itl_target_ms: float | None = setting(
        None, "a step takes no more of a prompt than lets streams go on in time", "ms"
    )
    run_ahead: int | None = setting(
        None,
        "launched before the tokens of the oldest are read; default: 1 on a GPU, else 0",
        "steps",
    )
    block_size: int = setting(16, "KV block", "tokens")
    kv_cache_memory: int | None = setting(
        None, "KV cache; default: max-running contexts of 1024 tokens on CPU", "bytes"
    )
    swap_memory: int = setting(
        0, "on the host, for KV of requests that yield; without it, it is computed again", "bytes"
    )
    gpu_memory_fraction: float = setting(0.9, "of the GPU's memory, weights and KV together")
    prefix_caching: bool = setting(True, "reuse the KV of prompts that begin alike")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(50051, "gRPC; 0 picks a free one")
    http_port: int = setting(9400, "/metrics, /healthz and /readyz; 0 picks a free one")
    drain_timeout_s: float = setting(30.0, "for live requests to finish on SIGTERM", "s")
    default_timeout_s: float | None = setting(None, "deadline of requests that set none", "s")
    seed: int | None = setting(None, "of the seeds given to requests without one")

    def __post_init__(self) -> None:
        self._one_of("dtype", DTYPES)
        self._one_of("attention_backend", ATTENTION_BACKENDS)
        self._at_least("threads", 1)
        self._at_least("max_context", 2)
        self._at_least("max_running", 1)
        self._at_least("max_waiting", 1)
        self._at_least("max_waiting_tokens", 1)
        self._at_least("max_step_tokens", 1)
        self._at_least("max_wait_s", 0)
        self._one_of("policy", POLICIES)
        self._at_least("priority_aging_s", 0)
        self._at_least("itl_target_ms", 0)
        self._at_least("run_ahead", 0)
        self._at_least("kv_cache_memory", 1)
        self._at_least("swap_memory", 0)
        self._at_least("drain_timeout_s", 0)
        self._at_least("default_timeout_s", 0)
        self._at_least("port", 0)
        self._at_least("http_port", 0)
        self._check_weights()
        if self.block_size not in (16, 32, 64, 128):
            self._refuse("block_size", "16, 32, 64 or 128")
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            self._refuse("gpu_memory_fraction", "in (0, 1]")
        running, tokens = self.max_running, self.max_step_tokens
        if running is not None and tokens is not None and tokens < running:
            self._refuse("max_step_tokens", f"at least max_running ({running})")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, "one of " + ", ".join(choices))

    def _at_least(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if value is not None and not value >= low:
            self._refuse(name, f"at least {low}")

    def _check_weights(self) -> None:
        low, high = WEIGHTS
        for tenant, weight in (self.tenant_weights or {}).items():
            if not is_tenant(tenant):
                self._refuse("tenant_weights", f"of tenants named by {TENANT_LIMIT}")
            if not low <= weight <= high:
                self._refuse("tenant_weights", f"in [{low:g}, {high:g}] each")

    def _refuse(self, name: str, limit: str) -> None:
        raise InvalidRequest(f"{name} must be {limit}, got {getattr(self, name)!r}", name, limit)


def is_tenant(name: str) -> bool:
    """Whether a tenant may have this name."""
    return TENANT.fullmatch(name) is not None


def load_config(flags: dict[str, Any], path: Path | None = None) -> EngineConfig:
    """Merge a YAML file, the environment and flags (None: not given) into one EngineConfig.

    Raises InvalidRequest naming the setting that is unknown, of the wrong type or out of range.
    """
    values = _from_yaml(path) if path is not None else {}
    values |= _from_environment(os.environ)
    for name, value in flags.items():
        if value is not None:
            values[name] = _convert(name, value) if isinstance(value, str) else value
    return EngineConfig(**values)


def _from_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(f"config file {path}: {error}", "config", "a YAML mapping") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"config file {path} is not a mapping", "config", "a YAML mapping")
    names = {f.name for f in dataclasses.fields(EngineConfig)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise InvalidRequest(
                f"config file {path}: unknown setting {key!r}", str(key), "see --help"
            )
        values[name] = _convert(name, _as_text(value)) if value is not None else None
    return values


def _as_text(value: Any) -> str:
    """A value of a YAML file as the environment would spell it."""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return str(value)


def _from_environment(environment: Any) -> dict[str, Any]:
    values = {}
    for setting_field in dataclasses.fields(EngineConfig):
        text = environment.get(ENV_PREFIX + setting_field.name.upper())
        if text:
            values[setting_field.name] = _convert(setting_field.name, text)
    return values


def _convert(name: str, text: str) -> Any:
    """Read one setting from text, by the type that its field declares."""
    kind = EngineConfig.__annotations__[name].split(" ")[0]
    if name == "tenant_weights":
        return _read_weights(name, text)
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError) as error:
        raise InvalidRequest(f"{name} must be of type {kind}, got {text!r}", name, kind) from error


def _read_weights(name: str, text: str) -> dict[str, float]:
    """Read NAME=WEIGHT,NAME=WEIGHT; each name once."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        tenant, _, weight = part.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if math.isnan(value) or not tenant or tenant in weights:
            limit = "NAME=WEIGHT,NAME=WEIGHT with each name once"
            raise InvalidRequest(f"{name} must be {limit}, got {text!r}", name, limit)
        weights[tenant] = value
    return weights
