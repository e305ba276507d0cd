"""From an EngineConfig to a core: resolves what is "auto", loads the model, sizes the cache."""

from __future__ import annotations

from dataclasses import replace

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import Ready
from millrace.engine.errors import InvalidRequest
from millrace.engine.models.decoder import Decoder, Progress
from millrace.engine.models.registry import model_config
from millrace.engine.runner.assemble import Assembly, Placement, decode_calls, is_measured
from millrace.engine.runner.memory import room_for
from millrace.engine.runner.sizes import Sizes, sizes_for
from millrace.engine.weights.checkpoint import Checkpoint, open_checkpoint
from millrace.engine.weights.locate import ModelLocation
from millrace.kernels.dispatch import Operations, operations
from millrace.kernels.row_invariant_cpu import NotRowInvariant
from millrace.scheduler.cost_model import CostModel
from millrace.scheduler.policies import make_policy
from millrace.scheduler.scheduler import Limits, Scheduler

DETERMINISTIC = "attention_backend triton on CUDA; torch in float32 on a CPU"
"""Where the setting can be had."""


def build_core(
    config: EngineConfig,
    location: ModelLocation,
    progress: Progress | None = None,
) -> tuple[EngineCore, Ready]:
    """Load the model at `location` and put a scheduler and a runner around it.

    Raises ModelError, InvalidRequest or NotEnoughMemory, for a person to read, when it cannot be
    done.
    """
    return core_of(config, open_checkpoint(location.path), location.name, progress)


def core_of(
    config: EngineConfig, checkpoint: Checkpoint, name: str, progress: Progress | None = None
) -> tuple[EngineCore, Ready]:
    """`build_core` for a checkpoint that is open; `name` is the model's own."""
    placement = resolve_placement(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = model_config(checkpoint.config, checkpoint.generation_config)
    max_context = min(config.max_context or model.max_context, model.max_context)
    parts = (placement.operations, placement.dtype, placement.device, max_context, progress)
    try:
        with room_for("the model", config, placement.device):
            decoder = Decoder(model, checkpoint, *parts)
    except NotRowInvariant as error:
        raise InvalidRequest(f"deterministic: {error}", "deterministic", DETERMINISTIC) from error
    sizes = sizes_for(config, placement.device)
    passes = 2 if is_measured(config, placement.device) else 1
    calls = decode_calls(placement, sizes.max_running, max_context, passes, progress)
    built = Assembly(config, placement, decoder, max_context, sizes, calls).build()
    sizes = replace(sizes, max_step_tokens=built.max_step_tokens)
    moves = built.runner.moves
    limits = replace(
        limits_of(config, sizes, built.num_blocks, max_context, model.window),
        host_blocks=moves.num_host_blocks,
        block_copy_s=moves.measured_copy_s(),
    )
    core = EngineCore(build_scheduler(config, limits), built.runner, sizes.run_ahead)
    ready = Ready(
        model=config.served_name or name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=max_context,
        block_size=config.block_size,
        num_blocks=built.num_blocks,
        max_running=sizes.max_running,
        dtype=str(placement.dtype).removeprefix("torch."),
        device=str(placement.device),
        backend=placement.operations.name,
        num_parameters=decoder.num_parameters,
    )
    return core, ready


def resolve_placement(config: EngineConfig) -> Placement:
    """Settle device, dtype and kernels; raises InvalidRequest where they can't be had."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device type {device.type!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device is available")
        chosen = operations(device, config.attention_backend)
    except (RuntimeError, ValueError) as error:
        raise InvalidRequest(f"device {name!r}: {error}", "device", "cpu, cuda, cuda:N") from error
    dtype = _dtype(config, device)
    if config.deterministic:
        chosen = _deterministic(config, device, dtype)
    return Placement(device, dtype, chosen)


def _deterministic(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Operations:
    """Operations whose rows have the same bits in any batch; InvalidRequest if there are none."""
    try:
        chosen = operations(device, config.attention_backend, deterministic=True)
        if chosen.name == "torch" and dtype != torch.float32:
            raise ValueError(f"deterministic: expected float32 on a CPU, got {config.dtype}")
    except ValueError as error:
        raise InvalidRequest(str(error), "deterministic", DETERMINISTIC) from error
    return chosen


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    narrow = _cpu_has_bfloat16() and not config.deterministic  # which a CPU is in float32 only
    return torch.bfloat16 if narrow else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether bf16 products run in hardware; elsewhere they are slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def build_scheduler(config: EngineConfig, limits: Limits) -> Scheduler:
    """The scheduler of a server with these settings."""
    cost = CostModel()
    policy = make_policy(
        config.policy,
        limits.max_running,
        config.priority_aging_s,
        first_token_s=lambda request: cost.prefill_s(request.num_known),
    )
    asks_for_cost = config.itl_target_ms is not None or config.policy == "deadline"
    asks_for_cost |= limits.host_blocks > 0
    return Scheduler(limits, policy, cost if asks_for_cost else None)


def limits_of(
    config: EngineConfig,
    sizes: Sizes,
    num_blocks: int,
    max_context: int,
    window: int | None = None,
) -> Limits:
    """What the scheduler of a server with these settings may hand out, but for host blocks."""
    target_ms = config.itl_target_ms
    return Limits(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_running=sizes.max_running,
        max_step_tokens=sizes.max_step_tokens,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        max_context=max_context,
        max_wait_s=config.max_wait_s,
        itl_target_s=None if target_ms is None else target_ms / 1000,
        prefix_caching=config.prefix_caching,
        window=window,
    )
