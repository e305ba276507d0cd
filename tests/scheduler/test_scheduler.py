"""Scheduler, step by step: submit, schedule, look at the plan, feed a fabricated result, go on."""

import numpy as np
import pytest

from millrace.scheduler.admission import Accepted, Refused
from millrace.scheduler.cost_model import CostModel, StepLoad
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import NO_SLOT, Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler


def make_scheduler(**changes: object) -> Scheduler:
    limits = {
        "num_blocks": 16,
        "block_size": 4,
        "max_running": 4,
        "max_step_tokens": 16,
        "max_waiting": 8,
        "max_waiting_tokens": 1000,
    }
    return Scheduler(Limits(**(limits | changes)))


def make_request(
    request_id: int, prompt: int | list[int], max_tokens: int = 4, **fields
) -> Request:
    """A prompt given as a length is unlike any other request's."""
    if isinstance(prompt, int):
        prompt = [1000 * (request_id + 1) + position for position in range(prompt)]
    return Request(request_id, np.asarray(prompt, np.int32), max_tokens, **fields)


def submit(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        assert scheduler.submit(request) == Accepted()


def plan_of(scheduler: Scheduler, now_s: float = 0.0) -> StepPlan:
    plan = scheduler.schedule(now_s)
    assert plan is not None, "nothing was planned"
    check(scheduler)
    return plan


def apply(scheduler: Scheduler, plan: StepPlan, *rows: tuple) -> list[tuple[int, int]]:
    """Rows are (slot, token), with "stop" or "fail" behind; returns (request id, token)."""
    result = StepResult(
        plan.step,
        np.asarray([row[0] for row in rows], np.int64),
        np.asarray([row[1] for row in rows], np.int64),
        np.asarray(["stop" in row for row in rows], np.bool_),
        np.asarray(["fail" not in row for row in rows], np.bool_),
    )
    drawn = scheduler.apply(result)
    check(scheduler)
    return list(zip(drawn.request_ids.tolist(), drawn.token_ids.tolist(), strict=True))


def ended(scheduler: Scheduler) -> list[tuple[int, Finish | None]]:
    return [(request.id, request.finish) for request in scheduler.take_ended()]


def assert_all_is_returned(scheduler: Scheduler) -> None:
    check(scheduler)
    assert scheduler.is_idle
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.waiting_tokens) == (0, 0, 0)
    assert scheduler.pool.num_referenced == 0


# ---------------------------------------------------------------- one request


def test_a_prompt_is_computed_then_each_step_draws_one_token():
    scheduler = make_scheduler()
    submit(scheduler, request := make_request(0, prompt=6, max_tokens=3))
    first = plan_of(scheduler, now_s=5.0)
    slot, blocks = request.slot, scheduler.blocks_of(request)
    assert first.admitted == [request]
    assert first.block_appends.tolist() == [[slot, 0, blocks[0]], [slot, 1, blocks[1]]]
    assert first.prefill == [PrefillChunk(slot, 0, 6, samples=True)]
    assert request.scheduled_s == 5.0
    assert apply(scheduler, first, (slot, 70)) == [(0, 70)]
    second = plan_of(scheduler)
    assert (second.decode_joins, second.num_decodes, second.prefill) == ([slot], 1, [])
    assert apply(scheduler, second, (slot, 71)) == [(0, 71)]
    third = plan_of(scheduler)
    assert (third.decode_joins, third.decode_leaves, len(third.block_appends)) == ([], [], 0)
    assert apply(scheduler, third, (slot, 72)) == [(0, 72)]
    assert ended(scheduler) == [(0, Finish.LENGTH)]
    assert request.outputs == [70, 71, 72]
    assert scheduler.schedule() is None
    assert_all_is_returned(scheduler)


def test_a_decode_gets_a_block_just_when_it_begins_one():
    scheduler = make_scheduler(block_size=2)
    submit(scheduler, request := make_request(0, prompt=1, max_tokens=6))
    appends = []
    for _ in range(6):
        plan = plan_of(scheduler)
        appends.append(plan.block_appends[:, 1].tolist())
        apply(scheduler, plan, (request.slot, 9))
    # Positions 0 and 1 are in block 0, 2 and 3 in block 1, 4 and 5 in block 2.
    assert appends == [[0], [], [1], [], [2], []]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler = make_scheduler(max_step_tokens=4)
    submit(scheduler, request := make_request(0, prompt=10, max_tokens=1))
    chunks = []
    for _ in range(3):
        plan = plan_of(scheduler)
        chunks += plan.prefill
        rows = [(request.slot, 7)] if chunks[-1].samples else []
        apply(scheduler, plan, *rows)
    slot = chunks[0].slot
    assert chunks == [
        PrefillChunk(slot, 0, 4, False),
        PrefillChunk(slot, 4, 4, False),
        PrefillChunk(slot, 8, 2, True),
    ]
    assert ended(scheduler) == [(0, Finish.LENGTH)]


def test_a_request_launched_ahead_is_not_planned_past_its_last_token():
    scheduler = make_scheduler()
    submit(scheduler, request := make_request(0, prompt=3, max_tokens=2))
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert scheduler.schedule() is None
    apply(scheduler, first, (request.slot, 5))
    apply(scheduler, second, (request.slot, 6))
    assert request.outputs == [5, 6]
    assert_all_is_returned(scheduler)


def test_a_stop_token_ends_the_request_and_is_named():
    scheduler = make_scheduler()
    submit(scheduler, request := make_request(0, prompt=3))
    apply(scheduler, plan_of(scheduler), (request.slot, 42, "stop"))
    assert ended(scheduler) == [(0, Finish.STOP)]
    assert (request.outputs, request.stop_token) == ([42], 42)
    assert_all_is_returned(scheduler)


def test_tokens_drawn_behind_a_stop_token_are_dropped():
    scheduler = make_scheduler()
    submit(scheduler, request := make_request(0, prompt=3))
    slot_plan, ahead = plan_of(scheduler), plan_of(scheduler)
    slot = request.slot
    apply(scheduler, slot_plan, (slot, 42, "stop"))
    assert scheduler.num_running == 1, "a step with it is still in flight"
    assert apply(scheduler, ahead, (slot, 43)) == []
    assert request.outputs == [42]
    assert_all_is_returned(scheduler)


def test_a_row_without_a_token_fails_its_request_and_no_other():
    scheduler = make_scheduler()
    submit(scheduler, bad := make_request(0, prompt=3), good := make_request(1, prompt=3))
    plan = plan_of(scheduler)
    assert apply(scheduler, plan, (bad.slot, 0, "fail"), (good.slot, 8)) == [(1, 8)]
    assert ended(scheduler) == [(0, Finish.ERROR)]
    assert "no token could be drawn" in bad.error
    assert plan_of(scheduler).num_decodes == 1


# ---------------------------------------------------------------- many requests


def test_decodes_come_first_and_prompts_share_what_is_left_of_the_budget():
    scheduler = make_scheduler(max_step_tokens=6)
    submit(scheduler, first := make_request(0, prompt=2), second := make_request(1, prompt=9))
    plan = plan_of(scheduler)
    assert [chunk.length for chunk in plan.prefill] == [2, 4]
    apply(scheduler, plan, (first.slot, 5))
    plan = plan_of(scheduler)
    assert plan.num_decodes == 1
    assert plan.prefill == [PrefillChunk(second.slot, 4, 5, samples=True)]
    assert plan.num_tokens == 6


def test_requests_are_admitted_in_order_and_the_head_is_not_overtaken():
    scheduler = make_scheduler(num_blocks=4)
    submit(scheduler, running := make_request(0, prompt=8))
    apply(scheduler, plan_of(scheduler), (running.slot, 5))
    submit(scheduler, make_request(1, prompt=12, max_tokens=1), make_request(2, prompt=1))
    assert plan_of(scheduler).admitted == [], "request 2 would fit, but request 1 is first"
    assert scheduler.num_waiting == 2


def test_only_as_many_run_as_there_are_slots():
    scheduler = make_scheduler(max_running=2)
    submit(scheduler, *(make_request(i, prompt=2, max_tokens=1) for i in range(3)))
    plan = plan_of(scheduler)
    assert [request.id for request in plan.admitted] == [0, 1]
    slots = [request.slot for request in plan.admitted]
    apply(scheduler, plan, (slots[0], 5), (slots[1], 5))
    plan = plan_of(scheduler)
    assert sorted(plan.released) == sorted(slots)
    assert [request.id for request in plan.admitted] == [2]


def test_what_can_never_fit_is_refused_and_changes_nothing():
    scheduler = make_scheduler(num_blocks=2)
    assert scheduler.submit(make_request(0, prompt=5, max_tokens=4)) == Accepted()
    decision = scheduler.submit(make_request(1, prompt=6, max_tokens=4))
    assert isinstance(decision, Refused)
    assert decision.retry_after_s == 0
    assert scheduler.num_waiting == 1
    check(scheduler)


def test_a_long_prompt_does_not_keep_streams_waiting_longer_than_the_target():
    """The device takes a millisecond a token, and 10 besides: a target of 60 leaves some 50."""
    limits = Limits(512, 4, 4, 1000, 8, 10_000, itl_target_s=0.060)
    scheduler = Scheduler(limits, cost=CostModel())
    submit(scheduler, stream := make_request(0, prompt=4, max_tokens=200))
    steps = []
    for index in range(60):
        if index == 30:
            submit(scheduler, make_request(1, prompt=900, max_tokens=1))
        if index % 7 == 0:
            submit(scheduler, make_request(100 + index, prompt=1 + index, max_tokens=1))
        plan = plan_of(scheduler)
        prefill = sum(chunk.length for chunk in plan.prefill)
        seconds = 0.010 + 0.001 * plan.num_tokens
        scheduler.cost.measured(StepLoad(prefill, plan.num_decodes, plan.context_tokens), seconds)
        if plan.num_decodes:
            steps.append(seconds)
        slots = [chunk.slot for chunk in plan.prefill if chunk.samples]
        slots += [stream.slot] if plan.num_decodes else []
        apply(scheduler, plan, *((slot, 5) for slot in slots))
    assert max(steps) <= 0.066
    assert sorted(steps)[-5] >= 0.050, "and the time is used"


# ---------------------------------------------------------------- memory


def run_out_of_memory(steps_in_flight: int) -> tuple[Scheduler, Request, Request, list[StepPlan]]:
    """Two prompts fill a pool of four blocks; the next decode of either needs a fifth."""
    scheduler = make_scheduler(num_blocks=4, prefix_caching=False)
    old, young = make_request(0, prompt=8, max_tokens=8), make_request(1, prompt=8, max_tokens=8)
    submit(scheduler, old, young)
    plans = [plan_of(scheduler)]
    if steps_in_flight == 0:
        apply(scheduler, plans.pop(), (old.slot, 5), (young.slot, 6))
    return scheduler, old, young, plans


def test_the_youngest_yields_its_blocks_and_the_oldest_goes_on():
    scheduler, old, young, _ = run_out_of_memory(steps_in_flight=0)
    young_slot = young.slot
    plan = plan_of(scheduler)
    assert (plan.num_decodes, plan.decode_joins) == (1, [old.slot])
    assert plan.released == [young_slot]
    assert (young.slot, young.num_preemptions) == (NO_SLOT, 1)
    assert scheduler.num_waiting == 1
    assert scheduler.counters.preemptions == 1


def test_a_preempted_request_computes_all_it_knows_again_and_says_nothing_twice():
    scheduler, old, young, _ = run_out_of_memory(steps_in_flight=0)
    apply(scheduler, plan_of(scheduler), (old.slot, 50))
    scheduler.finish(old.id, Finish.CANCELLED)
    plan = plan_of(scheduler)
    assert plan.admitted == [young]
    assert plan.prefill == [PrefillChunk(young.slot, 0, 9, samples=True)]
    assert apply(scheduler, plan, (young.slot, 61)) == [(1, 61)]
    scheduler.finish(young.id, Finish.CANCELLED)
    assert young.outputs == [6, 61]


def test_blocks_in_flight_are_awaited_and_nobody_else_yields_for_them():
    scheduler, old, young, plans = run_out_of_memory(steps_in_flight=1)
    young_slot = young.slot
    assert scheduler.schedule() is None, "the blocks of the youngest are still being read"
    assert scheduler.schedule() is None
    assert scheduler.counters.preemptions == 1
    assert (young.slot, young.is_closing) == (young_slot, True)
    apply(scheduler, plans[0], (old.slot, 5), (young_slot, 6))
    assert (young.outputs, young.slot) == ([6], NO_SLOT), "its token in flight is not lost"
    assert plan_of(scheduler).decode_joins == [old.slot]


# ---------------------------------------------------------------- prefix cache


def test_a_second_prompt_starts_behind_the_blocks_it_shares():
    scheduler = make_scheduler()
    submit(scheduler, first := make_request(0, prompt=list(range(10))))
    apply(scheduler, plan_of(scheduler), (first.slot, 5))
    submit(scheduler, second := make_request(1, prompt=[*range(8), 99, 98]))
    plan = plan_of(scheduler)
    assert plan.prefill == [PrefillChunk(second.slot, 8, 2, samples=True)]
    ours, theirs = scheduler.blocks_of(second), scheduler.blocks_of(first)
    assert ours[:2].tolist() == theirs[:2].tolist()
    assert ours[2] != theirs[2]
    assert second.cached_tokens == 8
    assert scheduler.counters.prefix_hit_tokens == 8
    assert scheduler.counters.prefix_query_tokens == 20


def test_a_prompt_cached_whole_still_computes_its_last_token_in_a_copy():
    scheduler = make_scheduler()
    submit(scheduler, first := make_request(0, prompt=list(range(8)), max_tokens=1))
    plan = plan_of(scheduler)
    cached = scheduler.blocks_of(first).tolist()
    apply(scheduler, plan, (first.slot, 5))
    submit(scheduler, second := make_request(1, prompt=list(range(8))))
    plan = plan_of(scheduler)
    ours = scheduler.blocks_of(second).tolist()
    assert plan.prefill == [PrefillChunk(second.slot, 7, 1, samples=True)]
    assert ours[0] == cached[0] and plan.block_copies == [(cached[1], ours[1])]
    assert second.cached_tokens == 7


def test_the_next_turn_of_a_chat_goes_on_in_a_copy_of_the_last_ones_unfinished_block():
    scheduler = make_scheduler()
    submit(scheduler, first := make_request(0, prompt=[1, 2, 3, 4, 5], max_tokens=3))
    while (plan := scheduler.schedule()) is not None:
        cached = scheduler.blocks_of(first).tolist()
        apply(scheduler, plan, (first.slot, 60))
    # Computed: the prompt and two of the three tokens drawn, 60 60 of 60 60 60.
    submit(scheduler, second := make_request(1, prompt=[1, 2, 3, 4, 5, 60, 60, 9, 9]))
    plan = plan_of(scheduler)
    assert plan.block_copies == [(cached[1], scheduler.blocks_of(second)[1])]
    assert plan.prefill == [PrefillChunk(second.slot, 7, 2, samples=True)]
    submit(scheduler, other := make_request(2, prompt=[1, 2, 3, 4, 5, 60, 60], tenant="other"))
    plan = plan_of(scheduler)
    assert (plan.block_copies, other.cached_tokens) == ([], 0)


def test_followers_copy_the_block_in_which_their_leaders_prompt_ends():
    scheduler = make_scheduler(max_step_tokens=7)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    submit(scheduler, leader := make_request(0, prompt), make_request(1, prompt, leader=0))
    apply(scheduler, plan_of(scheduler), (leader.slot, 50))  # and nothing is left of the budget
    plan = plan_of(scheduler)
    (follower,) = plan.admitted
    shared, source = scheduler.blocks_of(leader).tolist()
    assert scheduler.blocks_of(follower)[0] == shared
    assert plan.block_copies == [(source, scheduler.blocks_of(follower)[1])]
    assert plan.prefill == [PrefillChunk(follower.slot, 6, 1, samples=True)]


def test_what_the_same_step_computes_is_not_copied_yet():
    scheduler = make_scheduler()
    prompt = [1, 2, 3, 4, 5, 6, 7]
    submit(scheduler, make_request(0, prompt), make_request(1, prompt, leader=0))
    plan = plan_of(scheduler)
    assert len(plan.admitted) == 2 and plan.block_copies == []


@pytest.mark.parametrize("caching", [True, False])
def test_a_request_may_decline_the_cache_and_so_may_the_whole_scheduler(caching):
    scheduler = make_scheduler(prefix_caching=caching)
    submit(scheduler, first := make_request(0, prompt=list(range(8)), max_tokens=1))
    apply(scheduler, plan_of(scheduler), (first.slot, 5))
    submit(scheduler, make_request(1, prompt=list(range(8)), read_cache=not caching))
    assert plan_of(scheduler).prefill[0].start == 0


def test_a_prompt_that_comes_twice_at_once_is_computed_once():
    scheduler = make_scheduler(max_step_tokens=6)
    prompt = list(range(15))
    submit(scheduler, make_request(0, prompt), make_request(1, [*prompt[:13], 99]))
    chunks = []
    while scheduler.num_waiting:
        plan = plan_of(scheduler)
        chunks += [(c.slot, c.start, c.length) for c in plan.prefill]
        apply(scheduler, plan, *[(c.slot, 50) for c in plan.prefill if c.samples])
    first, second = chunks[0][0], chunks[-1][0]
    # The second waits while the first computes, and starts behind the 12 tokens that they share.
    assert chunks == [(first, 0, 6), (first, 6, 6), (first, 12, 3), (second, 12, 2)]


def test_followers_wait_for_their_leader_and_then_share_its_prompt():
    scheduler = make_scheduler(max_step_tokens=8)
    leader = make_request(0, prompt=list(range(12)))
    follower = make_request(1, prompt=list(range(12)), leader=0)
    submit(scheduler, leader, follower)
    plan = plan_of(scheduler)
    assert plan.admitted == [leader]
    apply(scheduler, plan)
    plan = plan_of(scheduler)  # ends the leader's prompt: from here on its blocks can be shared
    assert plan.admitted == [follower]
    assert follower.cached_tokens == 8


def test_followers_of_a_cancelled_leader_go_on_alone():
    scheduler = make_scheduler()
    submit(scheduler, make_request(0, prompt=12), follower := make_request(1, prompt=3, leader=0))
    scheduler.finish(0, Finish.CANCELLED)
    assert plan_of(scheduler).admitted == [follower]


@pytest.mark.parametrize("leader", [0, 77], ids=["itself", "unknown"])
def test_a_leader_that_cannot_lead_is_not_waited_for(leader):
    scheduler = make_scheduler()
    submit(scheduler, request := make_request(0, prompt=3, leader=leader))
    assert plan_of(scheduler).admitted == [request]


# ---------------------------------------------------------------- the end, early


def test_a_waiting_request_that_is_cancelled_is_never_admitted():
    scheduler = make_scheduler()
    submit(scheduler, make_request(0, prompt=3))
    assert scheduler.finish(0, Finish.CANCELLED)
    assert scheduler.schedule() is None
    assert ended(scheduler) == [(0, Finish.CANCELLED)]
    assert_all_is_returned(scheduler)


def test_cancel_in_flight_frees_blocks_once_the_step_is_applied():
    scheduler = make_scheduler()
    submit(scheduler, request := make_request(0, prompt=6))
    plan, slot = plan_of(scheduler), request.slot
    assert scheduler.finish(0, Finish.CANCELLED)
    check(scheduler)
    assert (scheduler.num_running, scheduler.pool.num_referenced) == (1, 2)
    assert ended(scheduler) == [(0, Finish.CANCELLED)], "the client need not wait for the step"
    assert apply(scheduler, plan, (slot, 5)) == []
    assert_all_is_returned(scheduler)


def test_a_request_ends_once_whatever_comes_after():
    scheduler = make_scheduler()
    submit(scheduler, make_request(0, prompt=3, deadline_s=1.0))
    assert scheduler.finish(0, Finish.CANCELLED)
    assert not scheduler.finish(0, Finish.STOP)
    assert not scheduler.finish(99, Finish.CANCELLED)
    scheduler.expire(now_s=2.0)
    assert ended(scheduler) == [(0, Finish.CANCELLED)]
    assert ended(scheduler) == []


def test_deadlines_end_requests_in_the_queue_and_in_a_slot_when_they_come():
    scheduler = make_scheduler(max_running=1)
    running = make_request(0, prompt=3, deadline_s=2.0)
    submit(scheduler, running, make_request(1, prompt=3, deadline_s=1.0))
    apply(scheduler, plan_of(scheduler), (running.slot, 5))
    scheduler.expire(now_s=0.9)
    assert ended(scheduler) == []
    scheduler.expire(now_s=1.0)
    assert ended(scheduler) == [(1, Finish.DEADLINE)]
    scheduler.expire(now_s=10.0)
    assert ended(scheduler) == [(0, Finish.DEADLINE)]
    assert running.outputs == [5], "what was drawn in time stays"
    assert_all_is_returned(scheduler)


def test_an_id_can_be_used_again_and_the_old_deadline_does_not_strike_the_new_request():
    scheduler = make_scheduler()
    submit(scheduler, make_request(0, prompt=3, deadline_s=1.0))
    scheduler.finish(0, Finish.CANCELLED)
    submit(scheduler, make_request(0, prompt=3))
    scheduler.expire(now_s=2.0)
    assert ended(scheduler) == [(0, Finish.CANCELLED)]
    assert list(scheduler.requests) == [0]


def test_when_the_device_is_lost_what_runs_fails_what_waits_goes_on_and_no_kv_is_reused():
    scheduler = make_scheduler(max_running=1)
    running, waiting = make_request(0, prompt=8), make_request(1, prompt=list(range(8)))
    submit(scheduler, running, waiting)
    plan_of(scheduler)
    plan_of(scheduler)
    scheduler.abandon("out of memory")
    check(scheduler)
    assert ended(scheduler) == [(0, Finish.ERROR)]
    assert running.error == "out of memory"
    assert len(scheduler.cache) == 0
    plan = plan_of(scheduler)
    assert (plan.admitted, plan.decode_leaves) == ([waiting], [])
    assert plan.step == 3, "a late result of a lost step can be told from this one's"
