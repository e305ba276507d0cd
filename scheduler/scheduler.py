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

import numpy as np

from millrace.scheduler import speculation
from millrace.scheduler.admission import Accepted, Admission, Decision
from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.block_tables import BlockTables
from millrace.scheduler.cost_model import CostModel
from millrace.scheduler.decode_set import DecodeSet
from millrace.scheduler.idle_blocks import BlockIds
from millrace.scheduler.limits import Counters, Limits
from millrace.scheduler.plan import Drawn, PrefillChunk, Rows, StepPlan, StepResult
from millrace.scheduler.policy import FirstComeFirstServed, Policy
from millrace.scheduler.prefix_cache import PrefixCache
from millrace.scheduler.request import NO_SLOT, Finish, Request
from millrace.scheduler.request_heap import RequestHeap
from millrace.scheduler.slots import Slots, SlotTable

NO_SLOTS: Slots = np.empty(0, np.intp)


__all__ = ["Counters", "Limits", "Scheduler"]


class Scheduler:
    """Continuous batching over slots and KV blocks. Not thread safe; owned by one loop."""

    def __init__(
        self, limits: Limits, policy: Policy | None = None, cost: CostModel | None = None
    ) -> None:
        """`cost` serves `itl_target_s` and `host_blocks`; who runs the steps feeds it."""
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
        self._longest = limits.longest
        self._slots = SlotTable(limits.max_running, self._longest, limits.block_size)
        self._tables = BlockTables(limits, self._slots, self.pool, self.cache, cost)
        self._decodes = DecodeSet(self._slots)
        self._step = 0  # newest planned step
        self._applied = 0  # newest step whose result has been taken in
        self._drafts: dict[int, Rows] = {}  # in flight, by step
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
            request, self._longest, self.num_waiting, self.waiting_tokens
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
            self._tables.host.drop(request)
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
        """The blocks that a request in a slot holds, in order, as a view."""
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
        self._drafts.clear()
        self._coming_blocks = 0
        self._decodes.forget()
        for request in [r for r in self.requests.values() if r.slot != NO_SLOT]:
            self.finish(request.id, Finish.ERROR, now_s, error=error)
        self.pool.flush()
        self._tables.host.lose(self.requests.values())

    # ------------------------------------------------------------ one step

    def schedule(self, now_s: float = 0.0) -> StepPlan | None:
        """Plan the next step; None when no request can move."""
        host = self._tables.host
        plan = StepPlan(self._step + 1, released=self._released, swap_outs=host.swap_outs)
        self._make_room()
        preemptions = self.counters.preemptions
        stalled = self._plan_decodes(plan)
        drafting = self._slots.drafting(stalled) if self._slots.num_lookahead else NO_SLOTS
        budget = self._prefill_budget(plan, drafting)
        may_admit = self.counters.preemptions == preemptions  # not where memory has just run out
        begun = self.policy.in_order(list(self._prefilling.values())) if self._prefilling else ()
        if may_admit and self.policy.is_pressing():
            budget = self._admit(plan, budget, now_s, only_pressing=True)
        for request in begun:
            budget -= self._plan_chunk(plan, request, budget)
        if may_admit:
            budget = self._admit(plan, budget, now_s)
        if len(drafting):
            speculation.plan_drafts(self._slots, self.pool, plan, drafting, budget)
            self._drafts[plan.step] = plan.drafts
        if plan.num_decodes == 0 and not plan.prefill and not len(drafting):
            self._decodes.withdraw()
            return None
        self._step = plan.step
        self._released, host.swap_outs = [], []
        self._decodes.commit(plan)
        return plan

    def apply(self, result: StepResult, now_s: float = 0.0) -> Drawn:
        """Take in a step's tokens, oldest step first; returns those of the live.

        Requests that end here also appear in `take_ended()`.
        """
        self._applied = result.step
        drafts = self._drafts.pop(result.step, None)
        if drafts is not None:
            result = self._settle_drafts(drafts, result)
        slots, token_ids, stopped = result.slots, result.token_ids, result.stopped
        failed = NO_SLOTS
        if self._closing or np.count_nonzero(result.ok) < len(slots):
            is_live = self._slots.is_live[slots]  # others ended while this step was in flight
            has_token = is_live & result.ok
            failed = slots[is_live & ~result.ok]
            slots, token_ids, stopped = slots[has_token], token_ids[has_token], stopped[has_token]
        if drafts is None:
            self._slots.append(slots, token_ids)
        else:
            self._slots.append_runs(slots, token_ids, speculation.first_of_run(slots))
        self.policy.drew(slots)
        drawn = Drawn(self._slots.ids[slots], token_ids)
        for row in stopped.nonzero()[0].tolist():
            stop_token = int(token_ids[row])
            self.finish(int(drawn.request_ids[row]), Finish.STOP, now_s, stop_token=stop_token)
        if len(failed):
            self._fail(failed, now_s)
        for slot in self._decodes.pop_last_draws(result.step):
            if self._slots.is_live[slot]:
                self.finish(self.request_at(slot).id, Finish.LENGTH, now_s)
        for request in self._closing.pop(result.step, ()):
            self._coming_blocks -= len(self.blocks_of(request))
            self._release(request)
        return drawn

    def _settle_drafts(self, drafts: Rows, result: StepResult) -> StepResult:
        """What of a result with drafts counts; whose drafts these were can be planned again."""
        result = speculation.up_to_ends(result)
        done = speculation.settle(self._slots, drafts, result)
        for request in self._closing.get(result.step, ()):
            self._slots.speculates[request.slot] = 0
        self._decodes.draw_last(result.step, done.tolist())
        return result

    def _fail(self, slots: Slots, now_s: float) -> None:
        error = "no token could be drawn: the logits are NaN, or no token is allowed"
        for slot in slots.tolist():
            self.finish(self.request_at(slot).id, Finish.ERROR, now_s, error=error)

    # ------------------------------------------------------------ parts of schedule()

    def _plan_decodes(self, plan: StepPlan) -> list[int]:
        """One token for every decoding slot; a block first for those that begin one.

        Returns the slots that get no block for now. All others that stream have room for a token.
        """
        table = self._slots
        streams = table.streams() if table.num_lookahead else table.decodes
        crossing = (table.computed + streams > table.capacity).nonzero()[0]
        stalled = self._grow(plan, crossing) if len(crossing) else []
        self._decodes.advance(plan, stalled)
        return stalled

    def _grow(self, plan: StepPlan, crossing: Slots) -> list[int]:
        """A new block for each of these decoding slots; returns those that get none for now."""
        if self._tables.window is not None:
            for slot in crossing.tolist():
                position = int(self._slots.computed[slot]) - self._in_flight(slot)
                self._tables.slide(self.request_at(slot), position, self._applied)
        blocks = self.pool.take(len(crossing))
        if blocks is not None:
            plan.append_blocks(crossing, self._slots.add_blocks(crossing, blocks), blocks)
            return []
        stalled: list[int] = []
        for slot in crossing.tolist():
            if self._slots.is_stream(slot) and not self._grow_one(plan, slot, len(stalled)):
                stalled.append(slot)
        streams = self._slots.streams()  # without those that were preempted meanwhile
        plan.block_appends = plan.block_appends[streams[plan.block_appends[:, 0]] != 0]
        # The last to yield may have brought blocks enough for some that had stalled before.
        return [slot for slot in stalled if streams[slot] and not self._extend(plan, slot)]

    def _grow_one(self, plan: StepPlan, slot: int, num_stalled: int) -> bool:
        """Append a block to a decoding slot, preempting others for it; False: not in this step."""
        while not self._extend(plan, slot):
            if self._coming_blocks > num_stalled:
                return False  # enough is on its way back; preempting more would be in vain
            if self._tables.window is not None and self._in_flight(slot):
                return False  # so may be the end of what still reads a block of its own
            self._preempt(self.policy.victim(self._running()))
            if not self._slots.is_stream(slot):
                return False  # it was the victim itself
        return True

    def _extend(self, plan: StepPlan, slot: int) -> bool:
        block = self.pool.take(1)
        if block is None:
            return False
        slots = np.array([slot])
        plan.append_blocks(slots, self._slots.add_blocks(slots, block), block)
        return True

    def _in_flight(self, slot: int) -> int:
        """Launched steps with a decoding slot, at most, whose results are not applied yet."""
        return max(0, self._decodes.last_step(slot) - self._applied)

    def _prefill_budget(self, plan: StepPlan, drafting: Slots) -> int:
        """Tokens left for prompts: within the step's limit, and the time that streams may wait."""
        num_streams = plan.num_decodes + len(drafting)
        budget = self.limits.max_step_tokens - num_streams
        if self.cost is None:
            return budget
        table = self._slots
        plan.context_tokens = int(table.computed @ table.decodes + table.computed[drafting].sum())
        target_s = self.limits.itl_target_s
        if target_s is None or num_streams == 0:
            return budget
        return min(budget, self.cost.budget(target_s, num_streams, plan.context_tokens))

    def _plan_chunk(self, plan: StepPlan, request: Request, budget: int) -> int:
        """The next part of a prompt, as far as the budget goes; returns its length."""
        missing = request.num_known - request.num_computed
        room = self._tables.room_ahead(plan, request, self._applied)
        length = min(budget, missing, room)
        if length <= 0:
            return 0
        if self._tables.window is not None:
            request.launched.append((plan.step, request.num_computed))
        chunk = PrefillChunk(request.slot, request.num_computed, length, length == missing)
        plan.prefill.append(chunk)
        request.num_computed += length
        self._slots.computed[request.slot] = request.num_computed
        self._slots.last_step[request.slot] = plan.step
        self._tables.wrote(plan.step, request, chunk.start)
        if chunk.samples:
            self._prefilled(request)
        return length

    def _prefilled(self, request: Request) -> None:
        """All known tokens are computed: from the next step on it decodes."""
        slot, table = request.slot, self._slots
        del self._prefilling[slot]
        if table.computed[slot] == table.end[slot]:
            self._decodes.draw_last(int(table.last_step[slot]), [slot])
        elif request.lookahead:
            table.speculates[slot] = 1
        else:
            self._decodes.join(slot)
        self._free_followers(request)

    def _make_room(self) -> None:
        """Someone yields, one a step, where the policy will not let its head wait for the others.

        Before anything is planned: so what it holds comes back at once, unless steps are in flight.
        """
        if self._closing or not self.policy.is_pressing():
            return
        head = self.policy.head()
        assert head is not None, "who is pressing waits"
        if not (self._slots.free and self._tables.fits(head)):
            victim = self.policy.makes_room(self._running())
            if victim is not None:
                self._preempt(victim)

    def _admit(self, plan: StepPlan, budget: int, now_s: float, only_pressing: bool = False) -> int:
        """Give slots and blocks to waiting requests, in the policy's order and never past it.

        A prompt that has begun takes the budget until it ends, or until one of another tenant is
        pressing. So whoever is admitted finds all that its tenant's prompts before it had in common
        with it: they are computed, or in this very step. Returns what is left of the budget.
        """
        while budget > 0 and self._slots.free and (request := self.policy.head()) is not None:
            if only_pressing and not (self.policy.is_pressing() and self._may_overtake(request)):
                break
            if not self._place(plan, request):
                break
            self.policy.pop()
            request.is_queued = False
            self._count_waiting(request, -1)
            request.scheduled_s = request.scheduled_s or now_s
            budget -= self._plan_chunk(plan, request, budget)
        return budget

    def _place(self, plan: StepPlan, request: Request) -> bool:
        """Reserve a slot, and blocks for all known tokens; False: there aren't enough blocks."""
        leader = None if request.leader is None else self.requests.get(request.leader)
        if leader is not None and leader.slot == NO_SLOT:
            leader = None
        if not self._tables.place(plan, request, leader):
            return False
        if request.num_preemptions == 0:
            request.cached_tokens = request.num_computed
            self.counters.prefix_query_tokens += len(request.prompt) if request.read_cache else 0
            self.counters.prefix_hit_tokens += request.cached_tokens
        self._prefilling[request.slot] = request
        plan.admitted.append(request)
        return True

    def _may_overtake(self, request: Request) -> bool:
        """Whether none of the begun prompts is of its own tenant: from that it may share blocks."""
        return all(begun.tenant != request.tenant for begun in self._prefilling.values())

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
        self._slots.speculates[slot] = 0
        self._decodes.leave(slot)
        self._prefilling.pop(slot, None)
        last_step = self._decodes.last_step(slot)
        if last_step > self._applied:
            self._closing[last_step].append(request)
            self._coming_blocks += len(self.blocks_of(request))
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Slot and blocks go back; full blocks stay cached. A preempted request waits again."""
        if request.finish is not Finish.ERROR:
            self._tables.leave(request)
        if request.finish is None:
            self._keep_outputs(request)
            self._tables.swap_out(request)
        self._tables.give_back(request)
        self.policy.left(request)
        self._released.append(request.slot)
        self._slots.vacate(request.slot)
        request.is_closing = False
        if request.finish is None:
            request.num_computed = 0
            request.launched.clear()
            self._count_waiting(request, +1)
            self._enqueue(request)

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
