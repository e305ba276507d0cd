"""Policy and its heap: order of arrival, the ended never seen again, the youngest yields."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.scheduler.deadline_first import EarliestDeadlineFirst
from millrace.scheduler.policy import FirstComeFirstServed, Ordered
from millrace.scheduler.priority import PriorityWithAging
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.request_heap import RequestHeap
from millrace.scheduler.scheduler import Limits, Scheduler


def make_requests(count: int) -> list[Request]:
    one_token = np.zeros(1, np.int32)
    return [Request(id=i, prompt=one_token, max_tokens=1, arrival=i) for i in range(count)]


def end(queue: FirstComeFirstServed, request: Request) -> None:
    request.finish = Finish.CANCELLED
    queue.gone(request)


def drain(queue: Ordered) -> list[int]:
    order = []
    while (request := queue.head()) is not None:
        order.append(request.id)
        queue.pop()
    return order


def test_requests_leave_in_order_of_arrival_whatever_the_order_they_came_back_in():
    queue = FirstComeFirstServed()
    for index in [2, 0, 3, 1]:
        queue.push(make_requests(4)[index])
    assert drain(queue) == [0, 1, 2, 3]


def test_head_stays_until_it_is_popped():
    queue = FirstComeFirstServed()
    queue.push(make_requests(1)[0])
    assert queue.head() is queue.head()
    queue.pop()
    assert queue.head() is None


@pytest.mark.parametrize("ended", [[0], [3], [0, 1, 2], [1, 3], [0, 1, 2, 3]], ids=str)
def test_ended_requests_are_skipped(ended):
    queue, requests = FirstComeFirstServed(), make_requests(4)
    for request in requests:
        queue.push(request)
    for index in ended:
        end(queue, requests[index])
    left = [index for index in range(4) if index not in ended]
    assert sorted(request.id for request in queue) == left
    assert drain(queue) == left


def test_a_queue_whose_requests_all_end_keeps_none_of_them():
    queue, requests = FirstComeFirstServed(), make_requests(100)
    for request in requests:
        queue.push(request)
    for request in reversed(requests):
        end(queue, request)
    assert list(queue) == []
    assert queue.head() is None


def test_the_youngest_yields():
    requests = make_requests(3)
    assert FirstComeFirstServed().victim(requests) is requests[2]


def requests_with(*fields: dict) -> list[Request]:
    one_token = np.zeros(1, np.int32)
    return [Request(i, one_token, 1, arrival=i, **field) for i, field in enumerate(fields)]


def order_of(policy: Ordered, requests: list[Request]) -> list[int]:
    for request in requests:
        policy.push(request)
    return drain(policy)


def test_classes_go_before_arrival_and_arrival_before_nothing():
    fields = [{"priority": 1}, {"priority": 0}, {"priority": 2}, {"priority": 0}]
    assert order_of(PriorityWithAging(aging_s=10.0), requests_with(*fields)) == [1, 3, 0, 2]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 100)), min_size=1, max_size=30),
    st.floats(0.5, 20),
)
def test_nobody_is_overtaken_by_who_comes_later_than_its_classes_are_worth(arrivals, aging_s):
    fields = [{"priority": p, "arrived_s": t} for p, t in sorted(arrivals, key=lambda a: a[1])]
    requests = requests_with(*fields)
    order = order_of(PriorityWithAging(aging_s), requests)
    for place, index in enumerate(order):
        waited_long = requests[index]
        for earlier in order[:place]:
            ahead_s = requests[earlier].arrived_s - waited_long.arrived_s
            assert ahead_s <= waited_long.priority * aging_s + 1e-9


def test_the_least_urgent_yields():
    requests = requests_with({"priority": 0}, {"priority": 2}, {"priority": 2}, {"priority": 1})
    assert PriorityWithAging(aging_s=10.0).victim(requests) is requests[2]


def test_what_is_due_first_is_first_and_what_is_never_due_last():
    due = [{"deadline_s": 9.0}, {}, {"deadline_s": 3.0}, {}, {"deadline_s": 3.0}]
    policy = EarliestDeadlineFirst(lambda request: 0.0)
    assert order_of(policy, requests_with(*due)) == [2, 4, 0, 1, 3]


def test_a_request_that_cannot_make_it_is_hopeless_and_one_that_just_can_is_not():
    policy = EarliestDeadlineFirst(lambda request: 0.5 * len(request.prompt))
    policy.push(requests_with({"deadline_s": 10.0})[0])
    assert policy.hopeless(now_s=9.5) is None
    assert policy.hopeless(now_s=9.6) is policy.head()


def test_what_is_shed_costs_no_prefill_and_those_behind_it_make_it():
    limits = Limits(16, 4, 1, 16, 8, 1000)
    scheduler = Scheduler(limits, EarliestDeadlineFirst(lambda request: 1.0))
    for request in requests_with({"deadline_s": 5.0}, {"deadline_s": 6.0}, {}):
        scheduler.submit(request)
    scheduler.expire(now_s=4.5)
    assert [(r.id, r.finish) for r in scheduler.take_ended()] == [(0, Finish.DEADLINE)]
    assert scheduler.counters.shed == 1
    plan = scheduler.schedule(now_s=4.5)
    assert plan is not None
    assert [request.id for request in plan.admitted] == [1]


def test_a_heap_gives_its_head_up_to_a_limit_and_ties_to_the_earlier():
    heap, requests = RequestHeap(), make_requests(3)
    for request, key in zip(requests, [5.0, 2.0, 2.0], strict=True):
        heap.push(key, request)
    assert heap.head(limit=1.9) is None
    assert heap.head(limit=2.0) is requests[1]
    assert heap.head() is requests[1]
