"""FairShare: shares by weight, no credit for idleness, and a bound on any difference."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from millrace.scheduler.fair_share import OUTPUT_PRICE, PROMPT_PRICE, SWEEP_AT, FairShare
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import StepResult
from millrace.scheduler.policy import MAX_YIELDS
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler

NUM_BLOCKS, BLOCK_SIZE, SLOTS = 60, 4, 6
LONGEST_PROMPT, MAX_TOKENS = 24, 12


class Loop:
    """A scheduler, a device that draws zeros, and what each tenant was given of both."""

    def __init__(self, num_blocks: int = NUM_BLOCKS):
        self.policy = FairShare(SLOTS)
        limits = Limits(num_blocks, BLOCK_SIZE, SLOTS, 32, 10_000, 10**7, prefix_caching=False)
        self.scheduler = Scheduler(limits, self.policy)
        self.given = Counter()  # by tenant, in the policy's prices
        self.decodes = set()
        self.started = []
        self.num = 0

    def submit(self, tenant, prompt=8, max_tokens=4, weight=1.0):
        request = Request(
            self.num, np.zeros(prompt, np.int32), max_tokens, tenant=tenant, weight=weight
        )
        self.num += 1
        self.scheduler.submit(request)
        return request

    def step(self):
        plan = self.scheduler.schedule()
        assert plan is not None
        for request in plan.admitted:
            if request.num_preemptions == 0:
                self.started.append(request)
                self.given[request.tenant] += PROMPT_PRICE * len(request.prompt) / request.weight
        self.decodes = (self.decodes - set(plan.decode_leaves)) | set(plan.decode_joins)
        slots = sorted(self.decodes | {chunk.slot for chunk in plan.prefill if chunk.samples})
        for slot in slots:
            request = self.scheduler.request_at(slot)
            self.given[request.tenant] += OUTPUT_PRICE / request.weight
        none, every = np.zeros(len(slots), np.bool_), np.ones(len(slots), np.bool_)
        ids = np.zeros(len(slots), np.int64)
        self.scheduler.apply(StepResult(plan.step, np.array(slots, np.int64), ids, none, every))
        check(self.scheduler)


def waiting_of(loop, tenant):
    return sum(request.tenant == tenant for request in loop.policy)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_blocks", [NUM_BLOCKS, 12], ids=["roomy", "preempting"])
def test_tenants_that_both_wait_differ_by_a_constant_however_much_one_sends(seed, num_blocks):
    rng, loop = Random(seed), Loop(num_blocks)
    most = {"greedy": 300, "small": 40, "medium": 80}
    for tenant, count in most.items():
        for _ in range(count):
            prompt = rng.randint(1, LONGEST_PROMPT)
            loop.submit(tenant, prompt, rng.randint(1, MAX_TOKENS))
    cached = num_blocks * BLOCK_SIZE
    bound = 2 * max(PROMPT_PRICE * LONGEST_PROMPT, OUTPUT_PRICE * cached)
    while all(waiting_of(loop, tenant) for tenant in most):
        loop.step()
        assert max(loop.given.values()) - min(loop.given[t] for t in most) <= bound
    if num_blocks == 12:
        assert loop.scheduler.counters.preemptions > 0, "memory never ran out"


def test_counters_are_what_was_given():
    loop = Loop()
    for index in range(20):
        loop.submit("ab"[index % 2], prompt=5 + index, max_tokens=1 + index % 7, weight=2.0)
    while loop.scheduler.requests:
        loop.step()
        for tenant in "ab":
            assert loop.policy.counter(tenant) == pytest.approx(loop.given[tenant])


def test_shares_follow_the_weights():
    loop, weights = Loop(), {"a": 1.0, "b": 2.0, "c": 4.0}
    for _ in range(300):
        for tenant, weight in weights.items():
            loop.submit(tenant, weight=weight)
    for _ in range(300):
        loop.step()
    served = {tenant: loop.given[tenant] * weight for tenant, weight in weights.items()}
    for tenant, weight in weights.items():
        assert served[tenant] / sum(served.values()) == pytest.approx(weight / 7, rel=0.05)


def test_a_newcomer_starts_at_once_behind_a_queue_of_five_hundred():
    loop = Loop()
    for _ in range(500):
        loop.submit("greedy")
    for _ in range(20):
        loop.step()
    small = loop.submit("small")
    while small not in loop.started:
        position = len(loop.started)
        loop.step()
    assert small in loop.started[position : position + SLOTS]
    assert len(loop.started) < 100


def test_idleness_earns_no_credit():
    """One that comes late gets its share from then on, and not what it did not use before."""
    loop = Loop()
    for _ in range(400):
        loop.submit("early")
    for _ in range(100):
        loop.step()
    for _ in range(200):
        loop.submit("late")
    before = loop.given.copy()
    for _ in range(60):
        loop.step()
    gained = loop.given - before
    assert gained["early"] == pytest.approx(gained["late"], rel=0.25)


def test_leaving_and_coming_back_under_the_same_name_resets_nothing():
    loop = Loop()
    for _ in range(100):
        loop.submit("other")
    visitor = loop.submit("visitor", prompt=20, max_tokens=10)
    while visitor.finish is None:
        loop.step()
    counter = loop.policy.counter("visitor")
    loop.submit("visitor")
    assert loop.policy.counter("visitor") >= counter


def test_tenants_that_are_gone_are_forgotten():
    loop = Loop()
    for index in range(20 * SWEEP_AT):
        request = loop.submit(f"tenant {index}", prompt=4, max_tokens=2)
        if index % 2:
            loop.scheduler.finish(request.id, Finish.CANCELLED)
        else:
            while request.finish is None:
                loop.step()
    assert len(loop.policy._tenants) <= 2 * SWEEP_AT
    assert len(loop.policy._order) <= 2 * SWEEP_AT


def test_who_has_yielded_often_is_spared():
    loop = Loop()
    old, young = loop.submit("a"), loop.submit("a")
    loop.step()
    assert loop.policy.victim([old, young]) is young
    young.num_preemptions = 3
    assert loop.policy.victim([old, young]) is old


def busy(loop, outputs=200, count=40):
    """Every slot is taken by long requests of one tenant, and more of them wait."""
    for _ in range(count):
        loop.submit("greedy", prompt=8, max_tokens=outputs)
    for _ in range(4):
        loop.step()
    assert loop.scheduler.num_running == SLOTS
    return loop


def roomy():
    return Loop(num_blocks=400)


def test_a_tenant_that_runs_nothing_does_not_wait_for_a_slot():
    loop = busy(roomy())
    small = loop.submit("small")
    loop.step()
    assert small in loop.started
    assert loop.scheduler.counters.preemptions == 1


def test_who_yields_is_the_youngest_and_goes_on_where_it_was():
    loop = busy(roomy(), outputs=30, count=SLOTS)
    loop.submit("small")
    loop.step()
    yielded = [request for request in loop.started if request.num_preemptions]
    assert [request.id for request in yielded] == [SLOTS - 1]
    while loop.scheduler.requests:
        loop.step()
    assert len(yielded[0].outputs) == 30


def test_haste_ends_at_half_of_what_the_greedy_runs():
    """Three requests of the small tenant at once: of six slots it gets two by others' yielding."""
    loop = busy(roomy())
    small = [loop.submit("small", max_tokens=200) for _ in range(3)]
    for _ in range(20):
        loop.step()
    assert [request in loop.started for request in small] == [True, True, False]
    assert loop.scheduler.counters.preemptions == 2


def test_a_greater_weight_is_in_more_haste():
    loop = busy(roomy())
    small = [loop.submit("small", max_tokens=200, weight=10.0) for _ in range(SLOTS)]
    for _ in range(20):
        loop.step()
    assert sum(request in loop.started for request in small) == SLOTS - 1


def test_nobody_yields_its_last_request():
    loop = roomy()
    first = [loop.submit(f"tenant {index}", max_tokens=50) for index in range(SLOTS)]
    for _ in range(3):
        loop.step()
    late = loop.submit("late")
    for _ in range(20):
        loop.step()
    assert late not in loop.started
    assert all(request.num_preemptions == 0 for request in first)


def test_short_requests_without_end_make_nobody_yield_for_ever():
    loop = busy(roomy(), outputs=100, count=SLOTS)
    greedy = [loop.scheduler.request_at(slot) for slot in range(SLOTS)]
    while any(request.finish is None for request in greedy):
        if not waiting_of(loop, "tiny"):
            loop.submit("tiny", prompt=1, max_tokens=1)
        loop.step()
    assert all(request.num_preemptions <= MAX_YIELDS for request in greedy)


def test_a_prompt_that_has_begun_does_not_hold_up_another_tenants():
    """The budget is 32 tokens a step; the greedy prompt would take it for 20 of them."""
    loop = roomy()
    loop.submit("greedy", prompt=640)
    loop.submit("greedy", prompt=640)
    for _ in range(21):  # the second has begun
        loop.step()
    small = loop.submit("small", prompt=48, max_tokens=2)
    for _ in range(2):
        loop.step()
    assert small in loop.started
    assert loop.scheduler.requests[small.id].num_computed == 48


def test_a_small_tenant_beside_five_hundred_requests_waits_two_steps_more_than_alone():
    """Steps to the first token of each of 20 requests that come while a step is under way."""

    def steps_to_first_token(loop):
        request, steps = loop.submit("small", prompt=48, max_tokens=2), 0
        while loop.scheduler.requests[request.id].num_computed != 48:
            loop.step()
            steps += 1
        while request.finish is None:
            loop.step()
        return steps

    alone, beside = roomy(), busy(roomy(), outputs=16, count=500)
    assert steps_to_first_token(alone) == 2
    for _ in range(20):
        assert steps_to_first_token(beside) <= 4
        for _ in range(8):  # it asks for less than its share
            beside.step()


def test_newcomers_without_end_do_not_pass_over_a_tenant_that_runs_nothing():
    loop = roomy()
    for index in range(SLOTS):  # all slots are others'
        loop.submit(f"early {index}", max_tokens=12)
    while len(loop.started) < SLOTS:
        loop.step()
    old = loop.submit("old")
    for index in range(10 * SLOTS):
        loop.submit(f"new {index}")
    while old not in loop.started:
        loop.step()
    assert loop.started[SLOTS] is old
