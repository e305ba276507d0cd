"""Policy and its heap: order of arrival, the ended never seen again, the youngest yields."""

import numpy as np
import pytest

from millrace.scheduler.policy import FirstComeFirstServed
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.request_heap import RequestHeap


def make_requests(count: int) -> list[Request]:
    one_token = np.zeros(1, np.int32)
    return [Request(id=i, prompt=one_token, max_tokens=1, arrival=i) for i in range(count)]


def end(queue: FirstComeFirstServed, request: Request) -> None:
    request.finish = Finish.CANCELLED
    queue.gone(request)


def drain(queue: FirstComeFirstServed) -> list[int]:
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


def test_a_heap_gives_its_head_up_to_a_limit_and_ties_to_the_earlier():
    heap, requests = RequestHeap(), make_requests(3)
    for request, key in zip(requests, [5.0, 2.0, 2.0], strict=True):
        heap.push(key, request)
    assert heap.head(limit=1.9) is None
    assert heap.head(limit=2.0) is requests[1]
    assert heap.head() is requests[1]
