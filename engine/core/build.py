"""From an EngineConfig to a core: resolves what is "auto", loads the model, sizes the cache."""

from __future__ import annotations

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import Ready
from millrace.engine.errors import InvalidRequest
from millrace.engine.models.decoder import Decoder, Progress
from millrace.engine.models.registry import model_config
from millrace.engine.runner.assemble import Assembly, Placement, decode_calls
from millrace.engine.runner.block_moves import BlockMoves
from millrace.engine.weights.checkpoint import Checkpoint, open_checkpoint
from millrace.engine.weights.locate import ModelLocation
from millrace.kernels.dispatch import operations
from millrace.scheduler.cost_model import CostModel
from millrace.scheduler.policies import make_policy
from millrace.scheduler.scheduler import Limits, Scheduler


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
    decoder = Decoder(
        model,
        checkpoint,
        placement.operations,
        placement.dtype,
        placement.device,
        max_context,
        progress,
    )
    run_ahead = steps_ahead(config, placement.device)
    calls = decode_calls(placement.device, config.max_running, max_context, progress)
    assembly = Assembly(config, placement, decoder, max_context, run_ahead, calls)
    runner, num_blocks = assembly.build()
    limits = _limits(config, num_blocks, max_context, model.window, runner.moves)
    core = EngineCore(_build_scheduler(config, limits), runner, run_ahead)
    ready = Ready(
        model=config.served_name or name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=max_context,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_running=config.max_running,
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
    return Placement(device, _dtype(config.dtype, device), chosen)


def steps_ahead(config: EngineConfig, device: torch.device) -> int:
    """Steps launched before the oldest is read; on a CPU the step would only wait in the queue."""
    if config.run_ahead is not None:
        return config.run_ahead
    return 1 if device.type == "cuda" else 0


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.bfloat16 if device.type == "cuda" or _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether bf16 products run in hardware; elsewhere they are slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _build_scheduler(config: EngineConfig, limits: Limits) -> Scheduler:
    cost = CostModel()
    policy = make_policy(
        config.policy,
        config.max_running,
        config.priority_aging_s,
        first_token_s=lambda request: cost.prefill_s(request.num_known),
    )
    asks_for_cost = config.itl_target_ms is not None or config.policy == "deadline"
    asks_for_cost |= limits.host_blocks > 0
    return Scheduler(limits, policy, cost if asks_for_cost else None)


def _limits(
    config: EngineConfig, num_blocks: int, max_context: int, window: int | None, moves: BlockMoves
) -> Limits:
    target_ms = config.itl_target_ms
    return Limits(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        max_context=max_context,
        max_wait_s=config.max_wait_s,
        itl_target_s=None if target_ms is None else target_ms / 1000,
        prefix_caching=config.prefix_caching,
        host_blocks=moves.num_host_blocks,
        block_copy_s=moves.measured_copy_s(),
        window=window,
    )
