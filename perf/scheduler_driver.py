"""SchedulerDriver: any scheduler without its model, as scheduler_costs.py drives it; and ours.

What the device would answer is made up (everyone draws the same token), and not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from millrace.scheduler.admission import Accepted
from millrace.scheduler.plan import StepPlan, StepResult
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler

T = TypeVar("T")
Prompt = npt.NDArray[np.int32]
BLOCK_SIZE = 16  # tokens, where the scheduler lets us choose
DRAWN = 7  # by everyone, always; no stop token


@dataclass(frozen=True, slots=True)
class Size:
    """What a scheduler is made for."""

    running: int  # slots
    context: int  # tokens of prompt and output
    step_tokens: int
    kv_tokens: int


class SchedulerDriver(Protocol):
    """Requests are told by the order in which they were submitted, from 0."""

    def submit(self, prompt: Prompt, max_tokens: int) -> int:
        """Nanoseconds until it waits."""

    def step(self) -> int:
        """Nanoseconds to plan a step, and to take in its tokens."""

    def cancel(self, number: int) -> int:
        """Nanoseconds to end a request that waits."""

    @property
    def num_drawn(self) -> int:
        """Tokens of the last step."""


MakeDriver = Callable[[Size], SchedulerDriver]


def timed(work: Callable[[], T]) -> tuple[T, int]:
    """What the work gives, and its nanoseconds: of the wall or of this thread, whichever are fewer.

    Each is a bound from above: the wall's clock runs on while others have the processor, the
    thread's takes long to read.
    """
    began_cpu = time.thread_time_ns()
    began = time.perf_counter_ns()
    done = work()
    took = time.perf_counter_ns() - began
    return done, min(took, time.thread_time_ns() - began_cpu)


class MillraceDriver:
    """Ours."""

    def __init__(self, size: Size) -> None:
        blocks = size.kv_tokens // BLOCK_SIZE
        queue = 20_000, 10**9  # requests, tokens
        self.scheduler = Scheduler(
            Limits(blocks, BLOCK_SIZE, size.running, size.step_tokens, *queue, size.context)
        )
        self._num_submitted = 0
        self._decodes = np.zeros(size.running, np.bool_)
        self._decode_slots = self._decodes.nonzero()[0]
        self.num_drawn = 0

    def submit(self, prompt: Prompt, max_tokens: int) -> int:
        number = self._num_submitted
        self._num_submitted += 1
        decision, took = timed(lambda: self.scheduler.submit(Request(number, prompt, max_tokens)))
        assert isinstance(decision, Accepted), decision
        return took

    def step(self) -> int:
        plan, planned = timed(self.scheduler.schedule)
        assert plan is not None, "there is work"
        result = self._result(plan)
        _, applied = timed(lambda: self.scheduler.apply(result))
        return planned + applied

    def cancel(self, number: int) -> int:
        return timed(lambda: self.scheduler.finish(number, Finish.CANCELLED))[1]

    def _result(self, plan: StepPlan) -> StepResult:
        """As the engine's runner, it hands out one array of slots while these decode."""
        if plan.decode_leaves or plan.decode_joins:
            self._decodes[plan.decode_leaves] = False
            self._decodes[plan.decode_joins] = True
            self._decode_slots = self._decodes.nonzero()[0]
        slots, ended = self._decode_slots, [chunk.slot for chunk in plan.prefill if chunk.samples]
        if ended:
            slots = np.concatenate([slots, np.array(ended, np.int64)])
        self.num_drawn = count = len(slots)
        none, every = np.zeros(count, np.bool_), np.ones(count, np.bool_)
        return StepResult(plan.step, slots, np.full(count, DRAWN), none, every)
