"""Judge: is this the plan that the policy promises? It sees public state, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.perf.sim.runner import FakeRunner, Sequence
from millrace.perf.sim.scenario import AGING_S
from millrace.scheduler.deadline_first import EarliestDeadlineFirst
from millrace.scheduler.plan import StepPlan
from millrace.scheduler.policy import MAX_YIELDS, Ordered
from millrace.scheduler.priority import PriorityWithAging
from millrace.scheduler.request import NO_SLOT, Request
from millrace.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Before:
    """What could move just before a step was planned."""

    ready: list[Sequence]  # decode, and have room in their last block
    crossing: list[Sequence]  # decode, and need another block first
    prefilling: list[Sequence]
    preemptions: dict[int, int]  # by request
    queued: set[int]
    num_pressing: int  # 1: somebody may yield to the head, memory or not


def look(scheduler: Scheduler, runner: FakeRunner) -> Before:
    queued = {request.id for request in scheduler.policy}
    before = Before([], [], [], {}, queued, int(scheduler.policy.is_pressing()))
    in_flight = {slot for slots in runner.drafting.values() for slot in slots}
    for request in scheduler.requests.values():
        before.preemptions[request.id] = request.num_preemptions
        if request.slot == NO_SLOT or request.is_closing:
            continue
        sequence = runner.slots[request.slot]
        assert sequence.request is request, f"slot {request.slot} is another's on the device"
        computed = sequence.computed
        assert computed is not None, "every admitted request computes something at once"
        if request.slot in in_flight:
            continue  # how far it got is not known before that lands
        if not sequence.is_prefilled:
            before.prefilling.append(sequence)
        elif computed < request.max_length - 1:
            has_room = computed < len(sequence.table) * runner.block_size
            (before.ready if has_room else before.crossing).append(sequence)
    return before


def judge(scheduler: Scheduler, runner: FakeRunner, before: Before, plan: StepPlan | None) -> None:
    """`plan` has been executed already, if it is one."""
    yielded = _yielded(scheduler, before)
    _judge_preemptions(scheduler, before, yielded)
    if plan is None:
        _judge_rest(scheduler, before)
        num_tokens = 0
    else:
        assert 0 < plan.num_tokens <= scheduler.limits.max_step_tokens, f"{plan.num_tokens} tokens"
        has_run_out = len(yielded) > before.num_pressing
        assert not (has_run_out and plan.admitted), "admitted where memory had just run out"
        _judge_order(scheduler, before, plan)
        _judge_sharing(scheduler, plan)
        num_tokens = plan.num_tokens
    drafting = {} if plan is None else {slot: length for slot, _, length in plan.drafts.tolist()}
    if num_tokens < scheduler.limits.max_step_tokens:
        _judge_leftover(scheduler, runner, before, may_admit=not yielded)
        _judge_drafts(scheduler, drafting)
    planned = drafting.keys() | runner.decoding if plan is not None else set()
    for sequence in before.ready:
        request = sequence.request
        if request in yielded:  # and may have come back in the same step
            continue
        is_planned = request.slot in planned
        assert is_planned or not _is_planned_on(request), f"request {request.id} is kept waiting"


def rank(scheduler: Scheduler, request: Request) -> tuple[float, int]:
    """What each policy promises, said once more. The least is served first, the greatest yields."""
    match scheduler.policy:
        case PriorityWithAging():
            return request.arrived_s + request.priority * AGING_S, request.arrival
        case EarliestDeadlineFirst():
            due_s = request.deadline_s
            return float("inf") if due_s is None else due_s, request.arrival
    return 0.0, request.arrival


def _is_planned_on(request: Request) -> bool:
    return request.slot != NO_SLOT and not request.is_closing


def _yielded(scheduler: Scheduler, before: Before) -> list[Request]:
    live = scheduler.requests.values()
    return [r for r in live if r.num_preemptions > before.preemptions[r.id]]


def _judge_preemptions(scheduler: Scheduler, before: Before, yielded: list[Request]) -> None:
    """The last in the policy's order yield, and no more of them than memory asks for.

    Who has yielded MAX_YIELDS times does so only where everyone has.
    """
    if not yielded:
        return
    staying = [r for r in scheduler.requests.values() if _is_planned_on(r)]
    policy = scheduler.policy
    if isinstance(policy, Ordered) and staying:
        last = max((r.num_preemptions < MAX_YIELDS, rank(scheduler, r)) for r in staying)
        first = min((r.num_preemptions <= MAX_YIELDS, rank(scheduler, r)) for r in yielded)
        assert first > last, "a request yielded to one that should have"
    if not scheduler.limits.prefix_caching:  # so every victim brings at least one block
        needed = len(before.crossing)
        needed += before.num_pressing
        assert len(yielded) <= needed, f"{len(yielded)} yielded where {needed} blocks were needed"


def _judge_order(scheduler: Scheduler, before: Before, plan: StepPlan) -> None:
    """Nobody overtakes the head of the queue, whether new or preempted."""
    policy = scheduler.policy
    if not isinstance(policy, Ordered):
        return
    waited = [request for request in policy if request.id in before.queued]
    for request in plan.admitted:
        ours = rank(scheduler, request)
        overtaken = [r.id for r in waited if rank(scheduler, r) < ours]
        is_late = request.id not in before.queued  # its leader's prompt ended in this step
        assert is_late or not overtaken, f"request {request.id} overtook requests {overtaken}"


def _judge_sharing(scheduler: Scheduler, plan: StepPlan) -> None:
    """No prompt is computed while another computes its beginning, or just after: it is shared.

    A chain that is closed can't be shared: another's block came between, or its window passed it.
    """
    limits, slots = scheduler.limits, scheduler._slots
    starts = {chunk.slot: chunk.start for chunk in plan.prefill}
    planned = [r for r in slots.requests if r is not None and r.slot in starts]
    sliding = limits.sliding
    longest = limits.longest if sliding is None else sliding.indexed * limits.block_size
    for request in plan.admitted:
        tokens = request.known_tokens()[:-1][:longest]
        before = [r for r in planned if r not in plan.admitted[plan.admitted.index(request) :]]
        for other in before if request.read_cache and limits.prefix_caching else ():
            if other.tenant == request.tenant and not slots.chains[other.slot].is_closed:
                length = min(other.num_computed, len(tokens))
                differs = other.known_tokens()[:length] != tokens[:length]
                common = int(differs.argmax()) if differs.any() else length
                shared = common // limits.block_size * limits.block_size
                found = starts.get(request.slot, request.num_known)
                assert found >= shared, (
                    f"request {request.id} computes positions {found} to {shared}, which request"
                    f" {other.id} has computed or is computing"
                )


def _judge_rest(scheduler: Scheduler, before: Before) -> None:
    """An empty step is right only if nothing can move."""
    waits = [s.request.id for s in before.crossing if _is_planned_on(s.request)]
    has_blocks = scheduler.pool.num_available > 0
    assert not (waits and has_blocks), f"requests {waits} wait for blocks that are there"


def _judge_leftover(
    scheduler: Scheduler, runner: FakeRunner, before: Before, may_admit: bool
) -> None:
    """Budget is left over only if no prompt and no waiting request could have used it."""
    for sequence in before.prefilling:
        is_done = sequence.is_prefilled or not _is_planned_on(sequence.request)
        # Behind a window a prompt may await the blocks that its own chunks in flight still read.
        is_done |= runner.window is not None and runner.is_busy
        assert is_done, f"the prompt of request {sequence.request.id} is kept waiting"
    head = scheduler.policy.head()
    if may_admit and head is not None and scheduler.num_running < scheduler.limits.max_running:
        need = -(-head.num_known // scheduler.limits.block_size)
        available = scheduler.pool.num_available
        assert need > available, f"request {head.id} waits for {need} of {available} blocks"


def _judge_drafts(scheduler: Scheduler, drafting: dict[int, int]) -> None:
    """Budget and blocks are left over: so nobody checks fewer drafts than it may."""
    if scheduler.pool.num_available == 0:  # tokens that one had no room for are not passed on
        return
    for slot, length in drafting.items():
        request = scheduler.request_at(slot)
        stop = int(scheduler._slots.computed[slot])  # as planned, with all of them
        may = min(request.lookahead + 1, request.max_length - 1 - stop + length)
        assert length == may, f"request {request.id} checks {length - 1} drafts of {may - 1}"
