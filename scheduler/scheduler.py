"""Scheduler (4 of 8): who gets tokens, slots and blocks in the next step; the one way to end.

One idea drives `schedule()`: every request's computed tokens catch up with its known tokens, under
one budget of tokens a step. A new prompt is far behind and catches up in chunks; a decoding request
is one token behind; a preempted one starts again from what the prefix cache kept. No phase flags.

Steps may be launched ahead of their results. So a request that ends while a launched step still
holds it is only marked: its slot and blocks return when the last such step is applied.

    who may free blocks                                   when
    _release(request), called by finish() and apply()     no launched step can touch them any more

Before it: engine/core/loop.py. After it: engine/runner/runner.py, which executes the plan.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from millrace.scheduler.admission import Accepted, Admission, Decision
from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.policy import FirstComeFirstServed, Policy
from millrace.scheduler.prefix_cache import PrefixCache
from millrace.scheduler.request import NEVER, NO_SLOT, Finish, Request
from millrace.scheduler.request_heap import RequestHeap


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may hand out."""

    num_blocks: int
    block_size: int  # tokens
    max_running: int  # slots
    max_step_tokens: int  # >= max_running, so that every decode always fits
    max_waiting: int
    max_waiting_tokens: int
    prefix_caching: bool = True


@dataclass(slots=True)
class Counters:
    """Running totals since the start."""

    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class Scheduler:
    """Continuous batching over slots and KV blocks. Not thread safe; owned by one loop."""

    def __init__(self, limits: Limits, policy: Policy | None = None) -> None:
        self.limits = limits
        self.policy: Policy = policy or FirstComeFirstServed()
        self.cache = PrefixCache(limits.block_size)
        self.pool = BlockPool(limits.num_blocks, self.cache)
        self.admission = Admission(limits.max_waiting, limits.max_waiting_tokens)
        self.counters = Counters()
        self.requests: dict[int, Request] = {}  # every request that has not ended
        self.num_waiting = 0
        self.waiting_tokens = 0
        self._followers: dict[int, list[Request]] = defaultdict(list)  # by leader's id
        self._prefilling: dict[int, Request] = {}  # by slot, in order of admission
        self._deadlines = RequestHeap()
        self._num_arrived = 0
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._request_of_slot: list[Request | None] = [None] * limits.max_running
        # By slot: whether it decodes, tokens computed, where decoding ends, newest launched step.
        self._decodes = np.zeros(limits.max_running, np.bool_)
        self._length = np.zeros(limits.max_running, np.int64)
        self._end = np.zeros(limits.max_running, np.int64)
        self._last_step = np.full(limits.max_running, NEVER, np.int64)
        self._planned_decodes = np.zeros(limits.max_running, np.bool_)  # as the runner knows them
        self._step = 0  # newest planned step
        self._applied = 0  # newest step whose result has been taken in
        self._closing: dict[int, list[Request]] = defaultdict(list)  # by their last step
        self._coming_blocks = 0  # held by closing requests
        self._released: list[int] = []  # slots, for the next plan
        self._ended: list[Request] = []

    # ------------------------------------------------------------ in and out

    @property
    def num_running(self) -> int:
        """Requests that own a slot, those about to leave it included."""
        return self.limits.max_running - len(self._free_slots)

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or is about to leave."""
        return not self.requests and not self._closing

    def submit(self, request: Request) -> Decision:
        """Take a new request into the queue, or say why not. Ids must be unique among the live."""
        decision = self.admission.decide(
            request,
            self._blocks_for(request.max_length - 1),  # the last token's KV is never computed
            self.limits.num_blocks,
            self.num_waiting,
            self.waiting_tokens,
        )
        if not isinstance(decision, Accepted):
            return decision
        request.arrival = self._num_arrived
        self._num_arrived += 1
        leader = None if request.leader is None else self.requests.get(request.leader)
        self.requests[request.id] = request
        self._count_waiting(request, +1)
        if request.deadline_s is not None:
            self._deadlines.push(request.deadline_s, request)
        if leader is not None and leader.num_computed < len(leader.prompt):
            self._followers[leader.id].append(request)
        else:
            self._enqueue(request)
        return decision

    def finish(
        self,
        request_id: int,
        reason: Finish,
        now_s: float = 0.0,
        stop_token: int | None = None,
        error: str = "",
    ) -> bool:
        """The one way to end, found by id in O(1). False: unknown, or ended already."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return False
        request.finish, request.stop_token, request.error = reason, stop_token, error
        self._ended.append(request)
        self.admission.ended(now_s)
        if request.deadline_s is not None:
            self._deadlines.gone()
        if request.slot != NO_SLOT:
            self._leave_slot(request)
        else:
            self._count_waiting(request, -1)
            if request.is_queued:
                self.policy.gone(request)
        self._free_followers(request)
        return True

    def request_at(self, slot: int) -> Request:
        """The request that owns a slot. It keeps it until its last launched step is applied."""
        request = self._request_of_slot[slot]
        assert request is not None, f"slot {slot} has no request"
        return request

    def take_ended(self) -> list[Request]:
        """Requests that have ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        return ended

    def expire(self, now_s: float) -> None:
        """End every request whose deadline has passed."""
        while (request := self._deadlines.head(limit=now_s)) is not None:
            self.finish(request.id, Finish.DEADLINE, now_s)

    def abandon(self, error: str, now_s: float = 0.0) -> None:
        """The launched steps are lost: end all that run, and trust no KV computed so far.

        The runner must forget which slots decode; the next plan starts from none.
        """
        self._applied = self._step
        for request in [request for last in self._closing.values() for request in last]:
            self._release(request)
        self._closing.clear()
        self._coming_blocks = 0
        self._planned_decodes[:] = False
        for request in [r for r in self.requests.values() if r.slot != NO_SLOT]:
            self.finish(request.id, Finish.ERROR, now_s, error=error)
        self.pool.flush()

    # ------------------------------------------------------------ one step

    def schedule(self, now_s: float = 0.0) -> StepPlan | None:
        """Plan the next step; None when no request can move."""
        plan = StepPlan(self._step + 1, released=self._released)
        preemptions = self.counters.preemptions
        self._plan_decodes(plan)
        budget = self.limits.max_step_tokens - plan.num_decodes
        for request in list(self._prefilling.values()):
            budget -= self._plan_chunk(plan, request, budget)
        if self.counters.preemptions == preemptions:  # admit nobody where memory has just run out
            self._admit(plan, budget, now_s)
        if plan.num_tokens == 0:
            return None
        self._step = plan.step
        self._released = []
        self._planned_decodes[plan.decode_leaves] = False
        self._planned_decodes[plan.decode_joins] = True
        return plan

    def apply(self, result: StepResult, now_s: float = 0.0) -> list[tuple[Request, int]]:
        """Take in a step's tokens, oldest step first; returns (request, token) of the live.

        Requests that end here also appear in `take_ended()`.
        """
        self._applied = result.step
        drawn = []
        columns = (result.slots, result.token_ids, result.stopped, result.ok)
        for slot, token, stopped, ok in zip(*(column.tolist() for column in columns), strict=True):
            request = self.request_at(slot)
            if request.finish is not None:
                continue  # it ended while this step was in flight
            if not ok:
                error = "no token could be drawn: the logits are NaN, or no token is allowed"
                self.finish(request.id, Finish.ERROR, now_s, error=error)
                continue
            request.outputs.append(token)
            drawn.append((request, token))
            if stopped:
                self.finish(request.id, Finish.STOP, now_s, stop_token=token)
            elif len(request.outputs) == request.max_tokens:
                self.finish(request.id, Finish.LENGTH, now_s)
        for request in self._closing.pop(result.step, ()):
            self._coming_blocks -= len(request.blocks)
            self._release(request)
        return drawn

    # ------------------------------------------------------------ parts of schedule()

    def _plan_decodes(self, plan: StepPlan) -> None:
        """One token for every decoding slot; a block first for those that begin one."""
        slots = np.flatnonzero(self._decodes)
        crossing = slots[self._length[slots] % self.limits.block_size == 0]
        stalled: list[int] = []
        for slot in crossing.tolist():
            if self._decodes[slot] and not self._grow(plan, slot, len(stalled)):
                stalled.append(slot)
        decodes = self._decodes.copy()
        decodes[stalled] = False  # they try again in the next step
        plan.block_appends = [row for row in plan.block_appends if decodes[row[0]]]
        plan.decode_leaves = np.flatnonzero(self._planned_decodes & ~decodes).tolist()
        plan.decode_joins = np.flatnonzero(decodes & ~self._planned_decodes).tolist()
        slots = np.flatnonzero(decodes)
        plan.num_decodes = len(slots)
        self._length[slots] += 1
        self._last_step[slots] = plan.step
        # One whose last token this step draws is not planned past it.
        self._decodes[slots[self._length[slots] == self._end[slots]]] = False

    def _grow(self, plan: StepPlan, slot: int, num_stalled: int) -> bool:
        """Append a block to a decoding slot, preempting others for it; False: not in this step."""
        while (block := self.pool.take()) is None:
            if self._coming_blocks > num_stalled:
                return False  # enough is on its way back; preempting more would be in vain
            self._preempt(self.policy.victim(self._running()))
            if not self._decodes[slot]:
                return False  # it was the victim itself
        request = self.request_at(slot)
        plan.block_appends.append((slot, len(request.blocks), block))
        request.blocks.append(block)
        return True

    def _plan_chunk(self, plan: StepPlan, request: Request, budget: int) -> int:
        """The next part of a prompt, as far as the budget goes; returns its length."""
        missing = request.num_known - request.num_computed
        length = min(budget, missing)
        if length <= 0:
            return 0
        chunk = PrefillChunk(request.slot, request.num_computed, length, length == missing)
        plan.prefill.append(chunk)
        request.num_computed += length
        self._length[request.slot] = request.num_computed
        self._last_step[request.slot] = plan.step
        if chunk.samples:
            self._prefilled(request)
        return length

    def _prefilled(self, request: Request) -> None:
        """All known tokens are computed: from the next step on it decodes."""
        slot = request.slot
        del self._prefilling[slot]
        self._end[slot] = request.max_length - 1
        self._decodes[slot] = self._length[slot] < self._end[slot]
        self._remember(request)
        self._free_followers(request)

    def _admit(self, plan: StepPlan, budget: int, now_s: float) -> None:
        """Give slots and blocks to waiting requests, in the policy's order and never past it."""
        while budget > 0 and self._free_slots and (request := self.policy.head()) is not None:
            if not self._place(plan, request):
                return
            self.policy.pop()
            request.is_queued = False
            self._count_waiting(request, -1)
            request.scheduled_s = request.scheduled_s or now_s
            budget -= self._plan_chunk(plan, request, budget)

    def _place(self, plan: StepPlan, request: Request) -> bool:
        """Reserve a slot, and blocks for all known tokens; False: there aren't enough blocks."""
        known = request.known_tokens()
        hits = self._cached_prefix(request, known)
        need = self._blocks_for(len(known)) - len(hits)
        idle_hits = sum(self.pool.refs[block] == 0 for block in hits)
        if self.pool.num_available - idle_hits < need:
            return False
        self.pool.share(hits)  # before taking others, which may evict
        request.blocks = hits + [self._take() for _ in range(need)]
        request.slot = self._free_slots.pop()
        request.num_computed = len(hits) * self.limits.block_size
        if request.num_preemptions == 0:
            request.cached_tokens = request.num_computed
            self.counters.prefix_query_tokens += len(known) if request.read_cache else 0
            self.counters.prefix_hit_tokens += request.cached_tokens
        self._request_of_slot[request.slot] = request
        self._prefilling[request.slot] = request
        plan.admitted.append(request)
        plan.block_appends += [(request.slot, i, block) for i, block in enumerate(request.blocks)]
        return True

    def _cached_prefix(self, request: Request, known: npt.NDArray[np.int32]) -> list[int]:
        """Cached blocks to begin with; at least one token is left to compute."""
        if not (self.limits.prefix_caching and request.read_cache):
            return []
        return self.cache.match(known[: len(known) - 1])

    # ------------------------------------------------------------ leaving a slot

    def _preempt(self, request: Request) -> None:
        """Take slot and blocks away; it returns to the queue and computes its tokens again."""
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self._leave_slot(request)

    def _leave_slot(self, request: Request) -> None:
        """Plan it no more, and release it now or when its last launched step is applied."""
        if request.is_closing:
            return
        slot = request.slot
        request.is_closing = True
        request.num_computed = int(self._length[slot])
        self._decodes[slot] = False
        self._prefilling.pop(slot, None)
        last_step = int(self._last_step[slot])
        if last_step > self._applied:
            self._closing[last_step].append(request)
            self._coming_blocks += len(request.blocks)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Slot and blocks go back; full blocks stay cached. A preempted request waits again."""
        if request.finish is not Finish.ERROR:
            self._remember(request)
        self.pool.give_back(request.blocks)
        self._request_of_slot[request.slot] = None
        self._free_slots.append(request.slot)
        self._released.append(request.slot)
        request.slot, request.blocks, request.is_closing = NO_SLOT, [], False
        if request.finish is None:
            request.num_computed = 0
            self._count_waiting(request, +1)
            self._enqueue(request)

    def _remember(self, request: Request) -> None:
        """Index its full blocks whose tokens are both known and computed."""
        if self.limits.prefix_caching:
            valid = min(request.num_computed, request.num_known)
            self.cache.insert(request.known_tokens()[:valid], request.blocks)

    # ------------------------------------------------------------ small things

    def _enqueue(self, request: Request) -> None:
        request.is_queued = True
        self.policy.push(request)

    def _free_followers(self, leader: Request) -> None:
        """The leader's prompt is computed, or never will be: its followers need not wait."""
        for request in self._followers.pop(leader.id, ()):
            if request.finish is None:
                self._enqueue(request)

    def _count_waiting(self, request: Request, sign: int) -> None:
        self.num_waiting += sign
        self.waiting_tokens += sign * len(request.prompt)

    def _running(self) -> list[Request]:
        return [r for r in self._request_of_slot if r is not None and not r.is_closing]

    def _take(self) -> int:
        block = self.pool.take()
        assert block is not None, "blocks were counted before they were taken"
        return block

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)
