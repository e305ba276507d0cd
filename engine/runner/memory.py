"""How much memory the KV cache gets, in blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from millrace.engine.config import EngineConfig
from millrace.engine.errors import InvalidRequest
from millrace.engine.models.registry import ModelConfig

CPU_TOKENS_PER_SLOT = 1024  # default on CPU: every running request may hold this much context,
CPU_SHARE = 0.5  # within this share of the memory that is free after loading the weights


def kv_blocks(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Blocks of KV for this model: as configured, or by default what the device has room for.

    Call it once the weights are loaded. Raises InvalidRequest when not even one block fits.
    """
    block_bytes = model.kv_elements_per_token * dtype.itemsize * config.block_size
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - (1.0 - config.gpu_memory_fraction) * total)
    else:
        wanted = config.max_running * CPU_TOKENS_PER_SLOT * block_bytes // config.block_size
        budget = min(wanted, int(available_memory() * CPU_SHARE))
    if budget < block_bytes:
        limit = f"at least {block_bytes} bytes"
        message = f"kv_cache_memory: one KV block takes {block_bytes} bytes, {budget} are given"
        raise InvalidRequest(message, "kv_cache_memory", limit)
    return budget // block_bytes


def available_memory() -> int:
    """Bytes that this process may still take on the host: the machine's and the cgroup's limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:  # no cgroup v2
        return available
    return available if limit == "max" else min(available, int(limit) - used)
