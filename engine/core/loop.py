"""EngineCore (3 of 8): the loop. A step is three verbs: schedule, execute, apply.

Knows neither sockets nor text: messages in, messages out. `serve` runs it in a process of its own
behind a channel; `engine/llm.py` calls `step` directly.

Before it: engine/async_engine.py. After it: scheduler/scheduler.py and engine/runner/runner.py.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace

import numpy as np

from millrace.engine.core.messages import (
    CacheFlushed,
    Cancel,
    Delta,
    FlushCache,
    FromCore,
    NewRequest,
    StepOutput,
    StepStats,
    TokenLogprobs,
)
from millrace.engine.runner.runner import LaunchedStep, Runner
from millrace.scheduler.admission import Refused
from millrace.scheduler.cost_model import StepLoad
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import StepPlan
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)


class EngineCore:
    """One scheduler and one runner. `run_ahead` steps are launched before the oldest is read."""

    def __init__(self, scheduler: Scheduler, runner: Runner, run_ahead: int = 0) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._run_ahead = run_ahead
        self._launched: deque[LaunchedStep] = deque()
        self._requests: dict[int, Request] = {}  # accepted, and their end not published yet
        self._loads: deque[tuple[StepLoad, float]] = deque()  # of those launched, and when
        self._answered_s = 0.0  # when the device gave the last result
        self._deltas: dict[int, Delta] = {}  # by request, since the last publication
        self._answers: list[FromCore] = []
        self._num_scored: dict[int, int] = {}  # request -> prompt positions reported
        self._stats = StepStats()
        self._counted = replace(scheduler.counters)  # as of the last StepStats
        self._num_evicted = 0  # likewise
        self._was_idle = True

    @property
    def is_idle(self) -> bool:
        """Nothing to compute, and nothing to say."""
        return self.scheduler.is_idle and not (self._launched or self._deltas or self._answers)

    def handle(self, message: NewRequest | Cancel | FlushCache) -> None:
        """Take in one message; what there is to answer comes with the next `step`."""
        match message:
            case NewRequest():
                self._submit(message)
            case Cancel():
                for request_id in message.ids:
                    self.scheduler.finish(request_id, Finish(message.reason), time.monotonic())
            case FlushCache():
                blocks = self.scheduler.pool.flush()
                self._answers.append(CacheFlushed(message.call, blocks))

    def step(self) -> list[FromCore]:
        """Schedule, execute, apply; returns what the step has to say.

        A step that fails ends the requests that run, and no others. Raises DeviceLost where the
        device cannot take another step: this core is of no use any more.
        """
        began = time.monotonic()
        self.scheduler.expire(began)
        plan = self.scheduler.schedule(began)
        scheduled = time.monotonic()
        launched = self._execute(plan) if plan is not None else True
        executed = time.monotonic()
        device_s = executed - scheduled
        if launched and len(self._launched) > (self._run_ahead if plan is not None else 0):
            device_s += self._apply(self._launched.popleft())
        self._count(plan, device_s)
        output = self._publish()
        self._stats.host_s = time.monotonic() - began - device_s
        return output

    # ------------------------------------------------------------ the three verbs' details

    def _execute(self, plan: StepPlan) -> bool:
        """Launch a plan. A failure ends all that run; the engine itself goes on."""
        prefill_tokens = plan.num_tokens - plan.num_decodes
        load = StepLoad(prefill_tokens, plan.num_decodes, plan.context_tokens)
        self._loads.append((load, time.monotonic()))
        try:
            self._launched.append(self._runner.execute(plan))
        except Exception as error:
            self._give_up(plan.step, error)
            return False
        return True

    def _give_up(self, step: int, error: Exception) -> None:
        """End all that run, and trust nothing that was computed for them."""
        log.error("step %d failed", step, exc_info=error)
        self._launched.clear()
        self._loads.clear()
        self.scheduler.abandon(f"the step failed: {error}", time.monotonic())
        self._runner.recover()

    def _apply(self, launched: LaunchedStep) -> float:
        """Wait for a step's tokens and turn them into deltas; returns the seconds waited.

        What a device did wrong may show only here, some steps after it was launched.
        """
        began = time.monotonic()
        try:
            result, logprobs = launched.result(), launched.logprobs()
            prompt_logprobs = launched.prompt_logprobs()
        except Exception as error:
            self._give_up(launched.step, error)
            return time.monotonic() - began
        waited_s = time.monotonic() - began
        self._measure()
        for slot, (start, scored) in prompt_logprobs.items():
            self._report_prompt(self.scheduler.request_at(slot), start, scored)
        scores = {self.scheduler.request_at(slot).id: logprobs[slot] for slot in logprobs}
        drawn = self.scheduler.apply(result, time.monotonic())
        columns = (drawn.request_ids.tolist(), drawn.token_ids.tolist())
        for request_id, token in zip(*columns, strict=True):
            delta = self._delta(self._requests[request_id])
            delta.token_ids.append(token)
            if request_id in scores:
                delta.logprobs = [*(delta.logprobs or ()), scores[request_id]]
        return waited_s

    def _measure(self) -> None:
        """Tell the cost model how long the oldest launched step took."""
        now = time.monotonic()
        load, launched_s = self._loads.popleft()
        if self.scheduler.cost is not None:
            self.scheduler.cost.measured(load, now - max(launched_s, self._answered_s))
        self._answered_s = now

    def _report_prompt(self, request: Request, start: int, scored: list[TokenLogprobs]) -> None:
        """Prompt logprobs, once each: a preempted request computes its prompt again."""
        if request.finish is not None:
            return
        reported = self._num_scored.get(request.id, 1)
        delta = self._delta(request)
        delta.prompt_logprobs = [*(delta.prompt_logprobs or ()), *scored[reported - start :]]
        self._num_scored[request.id] = max(reported, start + len(scored))

    # ------------------------------------------------------------ messages

    def _submit(self, message: NewRequest) -> None:
        request = Request(
            id=message.id,
            prompt=np.frombuffer(message.prompt, dtype="<i4").astype(np.int32),
            max_tokens=message.max_tokens,
            payload=message,
            arrived_s=message.arrival_s,
            deadline_s=message.deadline_s,
            leader=message.leader,
            priority=message.priority,
            tenant=message.tenant,
            weight=message.weight,
            read_cache=message.params.prompt_logprobs is None,
        )
        decision = self.scheduler.submit(request)
        if isinstance(decision, Refused):
            self._deltas[message.id] = Delta(
                message.id,
                [],
                finish="refused",
                error=decision.reason,
                field=decision.field,
                limit=decision.limit,
                retry_after_s=decision.retry_after_s,
            )
        else:
            self._requests[message.id] = request

    def _delta(self, request: Request) -> Delta:
        delta = self._deltas.get(request.id)
        if delta is None:
            delta = self._deltas[request.id] = Delta(request.id, [])
            delta.cached_tokens = request.cached_tokens
            delta.scheduled_s = request.scheduled_s
        return delta

    def _publish(self) -> list[FromCore]:
        for request in self.scheduler.take_ended():
            delta = self._delta(request)
            assert request.finish is not None, "ended requests have a reason"
            delta.finish = request.finish.value
            delta.stop_token_id = request.stop_token
            delta.error = request.error
            self._num_scored.pop(request.id, None)
            del self._requests[request.id]
        output: list[FromCore] = [
            *self._answers,
            StepOutput(list(self._deltas.values()), self._stats),
        ]
        self._deltas, self._answers = {}, []
        if self.scheduler.is_idle and not self._was_idle:
            check(self.scheduler)
        self._was_idle = self.scheduler.is_idle
        return output

    def _count(self, plan: StepPlan | None, device_s: float) -> None:
        scheduler, totals, before = self.scheduler, self.scheduler.counters, self._counted
        self._counted = replace(totals)
        self._stats = StepStats(
            step=plan.step if plan is not None else self._stats.step,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_total=scheduler.pool.num_blocks,
            blocks_used=scheduler.pool.num_referenced,
            blocks_cached=scheduler.cache.num_idle,
            prefill_tokens=sum(chunk.length for chunk in plan.prefill) if plan is not None else 0,
            decode_tokens=plan.num_decodes if plan is not None else 0,
            preemptions=totals.preemptions - before.preemptions,
            prefix_hit_tokens=totals.prefix_hit_tokens - before.prefix_hit_tokens,
            prefix_query_tokens=totals.prefix_query_tokens - before.prefix_query_tokens,
            evicted_blocks=scheduler.pool.num_evicted - self._num_evicted,
            swapped_out_blocks=len(plan.swap_outs) if plan is not None else 0,
            swapped_in_blocks=len(plan.swap_ins) if plan is not None else 0,
            shed=totals.shed - before.shed,
            step_s=device_s,
        )
        self._num_evicted = scheduler.pool.num_evicted
