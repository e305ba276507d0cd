"""Sizes: how much is in a batch, in a step and in flight; what a device has by default, and why.

A CPU multiplies as fast as it reads: a step takes as long as its tokens, and streams wait for it.
So its steps are small, and nothing is gained by a step that waits in a queue behind another.

A GPU multiplies bf16 weights with a row while it reads a byte of them: by their data sheets H100
and H200 could serve 160 to 300 rows in the time of one. Hence 256. 8192 tokens of prompt make
products that fill such a device; `itl_target_ms` holds steps shorter where streams must not wait.
While the host reads the tokens of one step, the next one is under way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from millrace.engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one engine."""

    max_running: int  # requests in a batch
    max_step_tokens: int  # computed in a step; at least max_running, so that every decode fits
    run_ahead: int  # steps launched before the oldest is read


DEFAULTS = {"cpu": Sizes(64, 512, 0), "cuda": Sizes(256, 8192, 1)}
SMALLEST_STEP = 512  # tokens, down to which a default gives way where memory is short


def sizes_for(config: EngineConfig, device: torch.device) -> Sizes:
    """As configured; for what is not, the device's default, within what is."""
    default, tokens = DEFAULTS[device.type], config.max_step_tokens
    running = config.max_running
    if running is None:
        running = default.max_running if tokens is None else min(default.max_running, tokens)
    if tokens is None:
        tokens = max(default.max_step_tokens, running)
    ahead = default.run_ahead if config.run_ahead is None else config.run_ahead
    return Sizes(running, tokens, ahead)


def step_sizes(config: EngineConfig, sizes: Sizes) -> list[int]:
    """Tokens of a step to try, best first: what is configured, or ever smaller halves."""
    found = [sizes.max_step_tokens]
    if config.max_step_tokens is None:
        while found[-1] // 2 >= max(SMALLEST_STEP, sizes.max_running):
            found.append(found[-1] // 2)
    return found
