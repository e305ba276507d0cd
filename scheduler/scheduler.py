"""Scheduler (4 of 8): who gets tokens, slots and blocks in the next step; the one way to end.

One idea drives `schedule()`: every request's computed tokens catch up with its known tokens, under
one budget of tokens a step. A new prompt is far behind and catches up in chunks; a decoding request
is one token behind; a preempted one starts again from what the prefix cache kept. No phase flags.

Steps may be launched ahead of their results. So a request that ends while a launched step still
holds it is only marked: its slot and blocks return when the last such step is applied.

    who may free blocks                                   when
    _release(request), called by finish() and apply()     no launched step can touch them any more

What a step asks of every running request is answered by arrays (slots.py). Python looks at single
requests only when they come, go, or compute their prompt.

Before it: engine/core/loop.py. After it: engine/runner/runner.py, which executes the plan.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import count, repeat

import numpy as np

from millrace.scheduler.admission import Accepted, Admission, Decision
from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.cost_model import CostModel
from millrace.scheduler.plan import Drawn, PrefillChunk, StepPlan, StepResult
from millrace.scheduler.policy import FirstComeFirstServed, Policy
from millrace.scheduler.prefix_cache import BlockIds, Chain, PrefixCache
from millrace.scheduler.request import NO_SLOT, Finish, Request
from millrace.scheduler.request_heap import RequestHeap
from millrace.scheduler.slots import Slots, SlotTable


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

    @property
    def longest(self) -> int:
        """Tokens of prompt and output at most. The last one's KV is never computed."""
        held = self.num_blocks * self.block_size + 1
        return held if self.max_context is None else min(held, self.max_context)


@dataclass(slots=True)
class Counters:
    """Running totals since the start."""

    preemptions: int = 0
    shed: int = 0  # ended while waiting, since their deadline could no longer be met
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class Scheduler:
    """Continuous batching over slots and KV blocks. Not thread safe; owned by one loop."""

    def __init__(
        self, limits: Limits, policy: Policy | None = None, cost: CostModel | None = None
    ) -> None:
        """`cost` is needed for `itl_target_s`; who runs the steps tells it how long they took."""
        self.limits = limits
        self.cost = cost
        self.policy: Policy = policy or FirstComeFirstServed()
        self.cache = PrefixCache(limits.block_size, limits.num_blocks)
        self.pool = BlockPool(limits.num_blocks, self.cache)
        self.admission = Admission(limits.max_waiting, limits.max_waiting_tokens, limits.max_wait_s)
        self.counters = Counters()
        self.requests: dict[int, Request] = {}  # every request that has not ended
        self.num_waiting = 0
        self.waiting_tokens = 0
        self._followers: dict[int, list[Request]] = defaultdict(list)  # by leader's id
        self._prefilling: dict[int, Request] = {}  # by slot, in order of admission
        self._deadlines = RequestHeap()
        self._num_arrived = 0
        self._slots = SlotTable(limits.max_running, limits.longest, limits.block_size)
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
        return self.limits.max_running - len(self._slots.free)

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or is about to leave."""
        return not self.requests and not self._closing

    def submit(self, request: Request) -> Decision:
        """Take a new request into the queue, or say why not. Ids must be unique among the live."""
        decision = self.admission.decide(
            request,
            self.limits.longest,
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
        self.admission.ended(now_s, self.num_waiting)
        if request.deadline_s is not None:
            self._deadlines.gone()
        if request.slot != NO_SLOT:
            self._keep_outputs(request)
            self._slots.is_live[request.slot] = False
            self._leave_slot(request)
        else:
            self._count_waiting(request, -1)
            if request.is_queued:
                self.policy.gone(request)
        self._free_followers(request)
        return True

    def request_at(self, slot: int) -> Request:
        """The request that owns a slot. It keeps it until its last launched step is applied."""
        request = self._slots.requests[slot]
        assert request is not None, f"slot {slot} has no request"
        return request

    def blocks_of(self, request: Request) -> BlockIds:
        """The block table of a request that owns a slot, as a view."""
        return self._slots.blocks(request.slot)

    def take_ended(self) -> list[Request]:
        """Requests that have ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        return ended

    def expire(self, now_s: float) -> None:
        """End every request whose deadline has passed, or can't be met by starting now."""
        while (request := self._deadlines.head(limit=now_s)) is not None:
            did_end = self.finish(request.id, Finish.DEADLINE, now_s)
            assert did_end, "deadlines are those of live requests"
        while (request := self.policy.hopeless(now_s)) is not None:
            self.counters.shed += 1
            did_end = self.finish(request.id, Finish.DEADLINE, now_s)
            assert did_end, "those that wait are live"

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
        budget = self._prefill_budget(plan)
        for request in list(self._prefilling.values()):
            budget -= self._plan_chunk(plan, request, budget)
        if self.counters.preemptions == preemptions:  # admit nobody where memory has just run out
            self._admit(plan, budget, now_s)
        if plan.num_tokens == 0:
            return None
        self._step = plan.step
        self._released = []
        if plan.decode_leaves or plan.decode_joins:
            self._planned_decodes[plan.decode_leaves] = False
            self._planned_decodes[plan.decode_joins] = True
        return plan

    def apply(self, result: StepResult, now_s: float = 0.0) -> Drawn:
        """Take in a step's tokens, oldest step first; returns those of the live.

        Requests that end here also appear in `take_ended()`.
        """
        self._applied = result.step
        slots, token_ids, stopped = result.slots, result.token_ids, result.stopped
        is_live = self._slots.is_live[slots]  # others ended while this step was in flight
        has_token = is_live & result.ok
        if np.count_nonzero(has_token) < len(slots):
            self._fail(slots[is_live & ~result.ok], now_s)
            slots, token_ids, stopped = slots[has_token], token_ids[has_token], stopped[has_token]
        self._slots.append(slots, token_ids)
        self.policy.drew(slots)
        drawn = Drawn(self._slots.ids[slots], token_ids)
        for row in stopped.nonzero()[0].tolist():
            stop_token = int(token_ids[row])
            self.finish(int(drawn.request_ids[row]), Finish.STOP, now_s, stop_token=stop_token)
        for slot in self._slots.at_length().tolist():
            self.finish(self.request_at(slot).id, Finish.LENGTH, now_s)
        for request in self._closing.pop(result.step, ()):
            self._coming_blocks -= len(self.blocks_of(request))
            self._release(request)
        return drawn

    def _fail(self, slots: Slots, now_s: float) -> None:
        error = "no token could be drawn: the logits are NaN, or no token is allowed"
        for slot in slots.tolist():
            self.finish(self.request_at(slot).id, Finish.ERROR, now_s, error=error)

    # ------------------------------------------------------------ parts of schedule()

    def _plan_decodes(self, plan: StepPlan) -> None:
        """One token for every decoding slot; a block first for those that begin one."""
        table = self._slots
        crossing = (table.decodes & (table.computed == table.capacity)).nonzero()[0]
        stalled = self._grow(plan, crossing) if len(crossing) else []
        decodes = table.decodes
        if stalled:  # they try again in the next step
            decodes = decodes.copy()
            decodes[stalled] = False
        changed = (decodes != self._planned_decodes).nonzero()[0]
        if len(changed):
            joins = decodes[changed]
            plan.decode_leaves = changed[~joins].tolist()
            plan.decode_joins = changed[joins].tolist()
        plan.num_decodes = int(np.count_nonzero(decodes))
        table.computed += decodes
        table.last_step[decodes] = plan.step
        # One whose last token this step draws is not planned past it.
        table.decodes &= table.computed != table.end

    def _grow(self, plan: StepPlan, crossing: Slots) -> list[int]:
        """A new block for each of these decoding slots; returns those that get none for now."""
        blocks = self.pool.take(len(crossing))
        if blocks is not None:
            plan.block_appends = self._slots.add_blocks(crossing, blocks)
            return []
        stalled: list[int] = []
        for slot in crossing.tolist():
            if self._slots.decodes[slot] and not self._grow_one(plan, slot, len(stalled)):
                stalled.append(slot)
        decodes = self._slots.decodes  # without those that were preempted meanwhile
        plan.block_appends = [row for row in plan.block_appends if decodes[row[0]]]
        # The last to yield may have brought blocks enough for some that had stalled before.
        return [slot for slot in stalled if decodes[slot] and not self._extend(plan, slot)]

    def _grow_one(self, plan: StepPlan, slot: int, num_stalled: int) -> bool:
        """Append a block to a decoding slot, preempting others for it; False: not in this step."""
        while not self._extend(plan, slot):
            if self._coming_blocks > num_stalled:
                return False  # enough is on its way back; preempting more would be in vain
            self._preempt(self.policy.victim(self._running()))
            if not self._slots.decodes[slot]:
                return False  # it was the victim itself
        return True

    def _extend(self, plan: StepPlan, slot: int) -> bool:
        block = self.pool.take(1)
        if block is not None:
            plan.block_appends += self._slots.add_blocks(np.array([slot]), block)
        return block is not None

    def _prefill_budget(self, plan: StepPlan) -> int:
        """Tokens left for prompts: within the step's limit, and the time that streams may wait."""
        budget = self.limits.max_step_tokens - plan.num_decodes
        if self.cost is None:
            return budget
        table = self._slots
        plan.context_tokens = int(table.computed @ (table.last_step == plan.step))
        target_s = self.limits.itl_target_s
        if target_s is None or plan.num_decodes == 0:
            return budget
        return min(budget, self.cost.budget(target_s, plan.num_decodes, plan.context_tokens))

    def _plan_chunk(self, plan: StepPlan, request: Request, budget: int) -> int:
        """The next part of a prompt, as far as the budget goes; returns its length."""
        missing = request.num_known - request.num_computed
        length = min(budget, missing)
        if length <= 0:
            return 0
        chunk = PrefillChunk(request.slot, request.num_computed, length, length == missing)
        plan.prefill.append(chunk)
        request.num_computed += length
        self._slots.computed[request.slot] = request.num_computed
        self._slots.last_step[request.slot] = plan.step
        self._remember(request)
        if chunk.samples:
            self._prefilled(request)
        return length

    def _prefilled(self, request: Request) -> None:
        """All known tokens are computed: from the next step on it decodes."""
        slot, table = request.slot, self._slots
        del self._prefilling[slot]
        table.decodes[slot] = table.computed[slot] != table.end[slot]
        self._free_followers(request)

    def _admit(self, plan: StepPlan, budget: int, now_s: float) -> None:
        """Give slots and blocks to waiting requests, in the policy's order and never past it."""
        while budget > 0 and self._slots.free and (request := self.policy.head()) is not None:
            if not self._place(plan, request):
                return
            self.policy.pop()
            request.is_queued = False
            self._count_waiting(request, -1)
            request.scheduled_s = request.scheduled_s or now_s
            budget -= self._plan_chunk(plan, request, budget)

    def _place(self, plan: StepPlan, request: Request) -> bool:
        """Reserve a slot, and blocks for all known tokens; False: there aren't enough blocks."""
        hits = self._cached_prefix(request)
        need = self._blocks_for(request.num_known) - len(hits)
        if self.pool.num_available - self.pool.num_idle(hits) < need:
            return False
        self.pool.share(hits)  # before taking others, which may evict
        fresh = self.pool.take(need)
        assert fresh is not None, "blocks were counted before they were taken"
        blocks = np.concatenate([hits, fresh])
        request.num_computed = len(hits) * self.limits.block_size
        chain = Chain(request.tenant, len(hits), is_closed=not self.limits.prefix_caching)
        slot = self._slots.occupy(request, blocks, request.num_computed, chain)
        if request.num_preemptions == 0:
            request.cached_tokens = request.num_computed
            self.counters.prefix_query_tokens += len(request.prompt) if request.read_cache else 0
            self.counters.prefix_hit_tokens += request.cached_tokens
        self._prefilling[slot] = request
        plan.admitted.append(request)
        plan.block_appends += zip(repeat(slot), count(), blocks.tolist())
        return True

    def _cached_prefix(self, request: Request) -> BlockIds:
        """Cached blocks to begin with; at least one token is left to compute."""
        if not (self.limits.prefix_caching and request.read_cache):
            return np.empty(0, np.int32)
        return self.cache.match(request.known_tokens()[:-1], request.tenant)

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
        request.num_computed = int(self._slots.computed[slot])
        self._slots.decodes[slot] = False
        self._prefilling.pop(slot, None)
        last_step = int(self._slots.last_step[slot])
        if last_step > self._applied:
            self._closing[last_step].append(request)
            self._coming_blocks += len(self.blocks_of(request))
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Slot and blocks go back; full blocks stay cached. A preempted request waits again."""
        if request.finish is not Finish.ERROR:
            self._remember(request)
        if request.finish is None:
            self._keep_outputs(request)
        self.pool.give_back(self.blocks_of(request))
        self.policy.left(request)
        self._released.append(request.slot)
        self._slots.vacate(request.slot)
        request.is_closing = False
        if request.finish is None:
            request.num_computed = 0
            self._count_waiting(request, +1)
            self._enqueue(request)

    def _remember(self, request: Request) -> None:
        """Index its full blocks whose tokens are both known and computed."""
        slot, table = request.slot, self._slots
        valid = table.tokens(slot)[: request.num_computed]
        self.cache.insert(valid, table.blocks(slot), table.chains[slot])

    def _keep_outputs(self, request: Request) -> None:
        request.outputs = self._slots.tokens(request.slot)[len(request.prompt) :].tolist()

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
        return [r for r in self._slots.requests if r is not None and not r.is_closing]

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)
