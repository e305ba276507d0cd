"""Steps of several tokens, by hand: what is planned, kept, taken back, and where requests end."""

import numpy as np
import pytest

from millrace.scheduler.admission import Refused
from millrace.scheduler.fair_share import OUTPUT_PRICE, PROMPT_PRICE, FairShare
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import PrefillChunk, StepPlan, StepResult
from millrace.scheduler.request import NO_SLOT, Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler
from millrace.scheduler.speculation import first_of_run, up_to_ends

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 16, max_step_tokens: int = 32, policy=None) -> Scheduler:
    return Scheduler(Limits(num_blocks, BLOCK_SIZE, 4, max_step_tokens, 8, 1000), policy)


def result_of(step: int, *rows: tuple) -> StepResult:
    """A row is a slot and its tokens; "stop" or "fail" may stand behind a token."""
    slots, tokens, flags = [], [], []
    for slot, *drawn in rows:
        for item in drawn:
            if isinstance(item, str):
                flags[-1] = item
            else:
                slots.append(slot)
                tokens.append(item)
                flags.append("")
    stopped = np.array([flag == "stop" for flag in flags], np.bool_)
    ok = np.array([flag != "fail" for flag in flags], np.bool_)
    return StepResult(step, np.array(slots, np.int64), np.array(tokens, np.int64), stopped, ok)


def plan_of(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None, "nothing was planned"
    check(scheduler)
    return plan


def apply(scheduler: Scheduler, plan: StepPlan, *rows: tuple) -> list[tuple[int, int]]:
    drawn = scheduler.apply(result_of(plan.step, *rows))
    check(scheduler)
    return list(zip(drawn.request_ids.tolist(), drawn.token_ids.tolist(), strict=True))


def start(scheduler: Scheduler, *requests: Request) -> None:
    """Compute their prompts; each draws a 9."""
    for request in requests:
        scheduler.submit(request)
    plan = plan_of(scheduler)
    apply(scheduler, plan, *((request.slot, 9) for request in requests))


def make_request(request_id: int, prompt: int = 6, max_tokens: int = 20, **fields) -> Request:
    tokens = 1000 * (request_id + 1) + np.arange(prompt, dtype=np.int32)
    return Request(request_id, tokens, max_tokens, **({"lookahead": 3} | fields))


def test_a_step_computes_the_last_token_and_its_drafts_and_keeps_a_prefix():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0))
    slot, plan = request.slot, plan_of(scheduler)
    assert plan.drafts.tolist() == [[slot, 6, 4]], "positions 6 to 9"
    assert (plan.num_decodes, plan.num_tokens, plan.decode_joins) == (0, 4, [])
    assert plan.block_appends[:, 1].tolist() == [2], "position 8 is the first of block 2"
    assert apply(scheduler, plan, (slot, 7, 8)) == [(0, 7), (0, 8)]
    plan = plan_of(scheduler)
    assert plan.drafts.tolist() == [[slot, 8, 4]], "position 8 is computed again, and right"
    assert len(plan.block_appends) == 0, "the block taken for drafts was kept"
    apply(scheduler, plan, (slot, 1, 2, 3, 4))
    assert plan_of(scheduler).drafts.tolist() == [[slot, 12, 4]]


def test_who_drafts_is_not_planned_again_before_its_result_and_others_run_ahead():
    scheduler = make_scheduler()
    start(scheduler, drafter := make_request(0), plain := make_request(1, lookahead=0))
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert (first.num_decodes, first.drafts.tolist()) == (1, [[drafter.slot, 6, 4]])
    assert (second.num_decodes, second.drafts.tolist()) == (1, [])
    apply(scheduler, first, (plain.slot, 5), (drafter.slot, 6, 7, 8))
    assert plan_of(scheduler).drafts.tolist() == [[drafter.slot, 9, 4]]


def test_after_its_prompt_one_token_is_certain_so_the_first_drafts_need_not_wait():
    scheduler = make_scheduler()
    scheduler.submit(request := make_request(0))
    prompt, drafts = plan_of(scheduler), plan_of(scheduler)
    assert drafts.drafts.tolist() == [[request.slot, 6, 4]]
    assert apply(scheduler, prompt, (request.slot, 9)) == [(0, 9)]
    assert apply(scheduler, drafts, (request.slot, 1)) == [(0, 1)]


def test_a_stop_token_among_the_kept_ends_the_request_right_there():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0))
    plan = plan_of(scheduler)
    assert apply(scheduler, plan, (request.slot, 7, 2, "stop", 8, 8)) == [(0, 7), (0, 2)]
    assert (request.finish, request.stop_token) == (Finish.STOP, 2)
    assert request.outputs == [9, 7, 2]
    assert scheduler.is_idle


def test_a_failure_among_the_kept_ends_the_request_with_the_tokens_before_it():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0))
    assert apply(scheduler, plan_of(scheduler), (request.slot, 7, 0, "fail", 8)) == [(0, 7)]
    assert (request.finish, request.outputs) == (Finish.ERROR, [9, 7])


def test_drafts_stop_at_the_last_token_and_a_request_ends_when_it_is_kept():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0, max_tokens=4))
    plan = plan_of(scheduler)
    assert plan.drafts.tolist() == [[request.slot, 6, 3]], "tokens 1 to 3 of 4"
    apply(scheduler, plan, (request.slot, 7, 8))
    plan = plan_of(scheduler)
    assert plan.drafts.tolist() == [[request.slot, 8, 1]]
    apply(scheduler, plan, (request.slot, 5))
    assert (request.finish, request.outputs) == (Finish.LENGTH, [9, 7, 8, 5])
    assert scheduler.is_idle


def test_prompts_come_before_drafts_and_these_share_what_is_left_in_order():
    scheduler = make_scheduler(max_step_tokens=12)
    start(scheduler, first := make_request(0, prompt=5), second := make_request(1, prompt=5))
    scheduler.submit(prompt := make_request(2, prompt=6))
    plan = plan_of(scheduler)
    assert plan.prefill == [PrefillChunk(prompt.slot, 0, 6, True)]
    lengths = {slot: length for slot, _, length in plan.drafts.tolist()}
    assert sorted(lengths) == sorted([first.slot, second.slot])
    assert sorted(lengths.values()) == [2, 4], "a token each is certain, then 4 drafts"
    assert plan.num_tokens == 12


def test_nobody_yields_blocks_for_drafts_and_one_token_is_drawn_all_the_same():
    scheduler = make_scheduler(num_blocks=4)
    start(
        scheduler, first := make_request(0, max_tokens=9), second := make_request(1, max_tokens=9)
    )
    plan = plan_of(scheduler)
    assert plan.drafts.tolist() == [[s, 6, 2] for s in sorted([first.slot, second.slot])]
    assert scheduler.counters.preemptions == 0


def test_drafts_in_flight_are_of_no_use_to_a_request_that_was_cancelled():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0))
    plan, slot = plan_of(scheduler), request.slot
    assert scheduler.finish(0, Finish.CANCELLED)
    check(scheduler)
    assert apply(scheduler, plan, (slot, 7, 8, 8)) == []
    assert request.outputs == [9]
    assert scheduler.is_idle


def test_who_yields_with_drafts_in_flight_keeps_what_they_drew():
    scheduler = make_scheduler(num_blocks=5)
    old, young = make_request(0, max_tokens=9, lookahead=0), make_request(1, max_tokens=9)
    start(scheduler, old, young)
    plans, slot = [plan_of(scheduler)], young.slot
    while not young.is_closing:  # the old one runs ahead, into the block that the drafts took
        plan = scheduler.schedule()
        check(scheduler)
        plans += [plan] if plan is not None else []
    for plan in plans:
        rows = [(old.slot, 3)] + ([(slot, 7, 8)] if len(plan.drafts) else [])
        apply(scheduler, plan, *rows)
    assert (young.slot, young.outputs) == (NO_SLOT, [9, 7, 8])


def test_the_prefix_cache_knows_the_kept_tokens_and_never_a_rejected_draft():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0, prompt=3))
    plan = plan_of(scheduler)
    assert plan.drafts.tolist() == [[request.slot, 3, 4]], "the last token and 3 drafts, to 6"
    apply(scheduler, plan, (request.slot, 7, 2, "stop"))
    known = np.array([*request.prompt.tolist(), 9, 7, 2, 50, 51], np.int32)
    scheduler.submit(next_turn := Request(1, known, max_tokens=1))
    assert plan_of(scheduler).prefill == [PrefillChunk(next_turn.slot, 5, 3, True)], (
        "positions 0 to 4 are known; 5 was a draft's, and it is the stop token's now"
    )


def test_a_tenant_pays_for_the_tokens_that_it_keeps():
    policy = FairShare(4)
    scheduler = make_scheduler(policy=policy)
    start(scheduler, request := make_request(0, tenant="a"))
    before = policy.counter("a")
    assert before == PROMPT_PRICE * 6 + OUTPUT_PRICE
    apply(scheduler, plan_of(scheduler), (request.slot, 7, 8, 5))
    assert policy.counter("a") == before + 3 * OUTPUT_PRICE


def test_when_the_device_is_lost_so_are_the_drafts_in_flight():
    scheduler = make_scheduler()
    start(scheduler, request := make_request(0))
    plan_of(scheduler)
    scheduler.abandon("lost")
    check(scheduler)
    assert (request.finish, scheduler.is_idle) == (Finish.ERROR, True)
    start(scheduler, another := make_request(1))
    assert plan_of(scheduler).drafts.tolist() == [[another.slot, 6, 4]]


def test_a_lookahead_below_zero_is_refused():
    decision = make_scheduler().submit(make_request(0, lookahead=-1))
    assert isinstance(decision, Refused)
    assert decision.field == "lookahead"


@pytest.mark.parametrize(
    ("slots", "first"), [([], []), ([3, 3, 5, 4, 4], [0, 0, 2, 3, 3]), ([0], [0])]
)
def test_the_first_row_of_each_run(slots, first):
    assert first_of_run(np.array(slots, np.int64)).tolist() == first


def test_only_rows_behind_an_end_of_the_same_slot_are_dropped():
    result = up_to_ends(result_of(1, (3, 1, "stop", 2, 2), (5, 4), (4, 6, 7, "fail", 8)))
    assert result.slots.tolist() == [3, 5, 4, 4]
    assert result.token_ids.tolist() == [1, 4, 6, 7]
    assert result.stopped.tolist() == [True, False, False, False]
    assert result.ok.tolist() == [True, True, True, False]
