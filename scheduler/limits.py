"""Limits and Counters: what the scheduler may hand out, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.scheduler.window import Window


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may hand out."""

    num_blocks: int
    block_size: int  # tokens
    max_running: int  # slots
    max_step_tokens: int  # >= max_running, so that every decode always fits
    max_waiting: int
    max_waiting_tokens: int
    max_context: int | None = None  # tokens of prompt and output; None: what the blocks can hold
    max_wait_s: float | None = None  # expected, of a new request
    itl_target_s: float | None = None  # how long a step may keep streams waiting
    prefix_caching: bool = True
    host_blocks: int = 0  # where requests that yield may leave their KV
    block_copy_s: float = 0.0  # how long a block takes to the host, or back
    window: int | None = None  # tokens that a position reads, of a model whose layers all have one

    @property
    def longest(self) -> int:
        """Tokens of prompt and output at most. The last one's KV is never computed."""
        held = self.num_blocks * self.block_size + 1
        if self.max_context is None:
            return held
        return min(held, self.max_context) if self.sliding is None else self.max_context

    @property
    def sliding(self) -> Window | None:
        """Which blocks go back while their request runs; None: none do."""
        return Window.make(self.window, self.block_size, self.num_blocks, self.max_step_tokens)


@dataclass(slots=True)
class Counters:
    """Running totals since the start."""

    preemptions: int = 0
    shed: int = 0  # ended while waiting, since their deadline could no longer be met
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
