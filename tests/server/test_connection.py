"""Connect over real channels: many requests on one stream, each with an end of its own."""

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from millrace.engine.server import connection
from millrace.v1 import inference_pb2 as pb

CODE = grpc.StatusCode


class Talk:
    """One Connect stream, driven by hand."""

    def __init__(self, server: Any) -> None:
        self._sent: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        self.call = server.inference.Connect(iter(self._sent.get, None))

    def submit(self, request_id: str, text: str = "abc", **fields: Any) -> None:
        sampling = pb.SamplingParams(**({"seed": 1} | fields.pop("sampling", {})))
        request = pb.GenerateRequest(
            request_id=request_id,
            prompt=pb.Prompt(text=text),
            sampling=sampling,
            stopping=pb.Stopping(max_tokens=fields.pop("max_tokens", len(text))),
            **fields,
        )
        self._sent.put(pb.ConnectRequest(submit=request))

    def cancel(self, request_id: str) -> None:
        cancel = pb.CancelRequest(request_id=request_id)
        self._sent.put(pb.ConnectRequest(cancel=cancel))

    def say(self, message: pb.ConnectRequest) -> None:
        self._sent.put(message)

    def half_close(self) -> None:
        self._sent.put(None)

    def next_failure(self) -> pb.ConnectResult:
        """Read on to the next failure; asserts that it stands alone in its message."""
        for response in self.call:
            for result in response.results:
                if result.HasField("failure"):
                    return result
        raise AssertionError("the stream ended without a failure")

    def rest(self) -> dict[str, list[pb.ConnectResult]]:
        """Every result up to the end of the stream, by request."""
        results: dict[str, list[pb.ConnectResult]] = {}
        for response in self.call:
            for result in response.results:
                results.setdefault(result.response.request_id, []).append(result)
        return results


@contextmanager
def talk_to(server: Any) -> Iterator[Talk]:
    talk = Talk(server)
    try:
        yield talk
    finally:
        talk.half_close()
        talk.call.cancel()


def text_of(results: list[pb.ConnectResult]) -> str:
    return "".join(o.text for r in results for o in r.response.outputs)


def ends(results: list[pb.ConnectResult]) -> int:
    return sum(r.HasField("failure") or r.response.HasField("summary") for r in results)


def wait_idle(server: Any, within_s: float = 5.0) -> None:
    end_s = time.monotonic() + within_s
    while (stats := server.server.engine().stats).running + stats.waiting:
        assert time.monotonic() < end_s, "still running"
        time.sleep(0.01)


def test_many_requests_share_a_stream_and_each_ends_once(served: Any) -> None:
    with talk_to(served) as talk:
        texts = {f"r{i}": "abcdefghij"[: 1 + i % 10] for i in range(40)}
        for request_id, text in texts.items():
            talk.submit(request_id, text)
        talk.half_close()
        results = talk.rest()
    assert {i: text_of(r) for i, r in results.items()} == texts
    assert all(ends(r) == 1 for r in results.values())
    assert talk.call.code() is CODE.OK


def test_a_step_is_one_message_for_all_its_requests(served: Any) -> None:
    with talk_to(served) as talk:
        for i in range(8):
            talk.submit(f"r{i}", "x", max_tokens=50)
        talk.half_close()
        sizes = [len(response.results) for response in talk.call]
    # 8 requests with 50 tokens: one message a token would be 400
    assert len(sizes) <= 8 * 2 + 55 and max(sizes) == 8


def test_an_invalid_submit_fails_alone(served: Any) -> None:
    with talk_to(served) as talk:
        talk.submit("good", "abc")
        talk.submit("bad", "abc", sampling={"top_p": 2.0})
        talk.submit("also good", "abc")
        talk.half_close()
        results = talk.rest()
    assert text_of(results["good"]) == text_of(results["also good"]) == "abc"
    (bad,) = results["bad"]
    assert bad.failure.code == CODE.INVALID_ARGUMENT.value[0]
    assert (bad.failure.field, bad.failure.limit) == ("top_p", "(0.0, 1.0]")
    assert talk.call.code() is CODE.OK


def test_a_live_id_is_refused_and_goes_on_living(served: Any) -> None:
    with talk_to(served) as talk:
        talk.submit("twin", "x", max_tokens=40)
        talk.submit("twin", "y")
        assert talk.next_failure().failure.code == CODE.ALREADY_EXISTS.value[0]
        talk.half_close()
        results = talk.rest()["twin"]
    assert results[-1].response.HasField("summary") and "y" not in text_of(results)


def test_an_id_is_free_again_once_its_request_has_ended(served: Any) -> None:
    with talk_to(served) as talk:
        for _ in range(3):
            talk.submit("again", "ab")
            text = ""
            for response in talk.call:
                (result,) = response.results
                text += text_of([result])
                assert not result.HasField("failure")
                if result.response.HasField("summary"):
                    break
            assert text == "ab"


def test_two_streams_may_use_the_same_id(served: Any) -> None:
    with talk_to(served) as one, talk_to(served) as other:
        for talk, text in ((one, "abc"), (other, "xyz")):
            talk.submit("same", text)
            talk.half_close()
        assert text_of(one.rest()["same"]) == "abc"
        assert text_of(other.rest()["same"]) == "xyz"


def test_the_cancel_of_an_unknown_id_is_not_found(served: Any) -> None:
    with talk_to(served) as talk:
        talk.cancel("nobody" * 100)
        result = talk.next_failure()
        assert result.failure.code == CODE.NOT_FOUND.value[0]
        assert result.response.request_id.startswith("nobody")
        talk.submit("r", "abc")
        talk.half_close()
        assert text_of(talk.rest()["r"]) == "abc"


def test_a_cancel_ends_its_request_with_what_it_had(served: Any) -> None:
    with talk_to(served) as talk:
        talk.submit("long", "x", max_tokens=4000)
        talk.submit("short", "abc", max_tokens=40)
        next(talk.call)
        talk.cancel("long")
        talk.half_close()
        results = talk.rest()
    (last,) = [o for r in results["long"] for o in r.response.outputs if o.finish_reason]
    assert last.finish_reason == pb.FINISH_REASON_CANCELLED and ends(results["long"]) == 1
    assert ends(results["short"]) == 1
    wait_idle(served)


def test_a_cancel_right_behind_its_submit_finds_it(served: Any) -> None:
    with talk_to(served) as talk:
        for i in range(20):  # still being tokenized, most likely
            talk.submit(f"r{i}", "x" * 2000 + str(i), max_tokens=1000)
            talk.cancel(f"r{i}")
        talk.half_close()
        results = talk.rest()
    assert len(results) == 20
    for parts in results.values():
        assert ends(parts) == 1 and not any(part.HasField("failure") for part in parts)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ConnectRequest(), "action"),
        (pb.ConnectRequest(submit=pb.GenerateRequest(prompt=pb.Prompt(text="a"))), "request_id"),
        (pb.ConnectRequest(submit=pb.GenerateRequest(request_id="x" * 257)), "request_id"),
        (pb.ConnectRequest(submit=pb.GenerateRequest(request_id="r")), "prompt"),
    ],
    ids=["no action", "no id", "long id", "no prompt"],
)
def test_a_message_without_sense_is_answered_in_the_stream(
    served: Any, message: pb.ConnectRequest, field: str
) -> None:
    with talk_to(served) as talk:
        talk.say(message)
        failure = talk.next_failure().failure
        assert (failure.code, failure.field) == (CODE.INVALID_ARGUMENT.value[0], field)
        talk.submit("r", "abc")
        talk.half_close()
        assert text_of(talk.rest()["r"]) == "abc"


def test_a_deadline_is_an_ordinary_end_here(served: Any) -> None:
    with talk_to(served) as talk:
        talk.submit("late", "x", max_tokens=4000, timeout_ms=50)
        talk.half_close()
        results = talk.rest()["late"]
    (last,) = [o for r in results for o in r.response.outputs if o.finish_reason]
    assert last.finish_reason == pb.FINISH_REASON_DEADLINE
    assert ends(results) == 1 and not any(r.HasField("failure") for r in results)


def test_a_stream_holds_a_bounded_number_of_requests(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_LIVE_REQUESTS", 2)
    with talk_to(served) as talk:
        for i in range(3):
            talk.submit(f"r{i}", "x", max_tokens=60)
        result = talk.next_failure()
        assert result.failure.code == CODE.RESOURCE_EXHAUSTED.value[0]
        assert result.failure.retry_after_ms > 0
        talk.half_close()
        assert set(talk.rest()) <= {"r0", "r1"}


def test_a_disconnect_cancels_everything_of_the_stream(served: Any) -> None:
    with talk_to(served) as talk:
        for i in range(30):  # more than the core has slots for
            talk.submit(f"r{i}", "x", max_tokens=4000)
        next(talk.call)
        talk.call.cancel()
        wait_idle(served)


def test_an_empty_stream_ends_when_the_client_says_so(served: Any) -> None:
    with talk_to(served) as talk:
        talk.half_close()
        assert talk.rest() == {} and talk.call.code() is CODE.OK


def test_a_client_that_does_not_read_loses_nothing_and_stops_nobody(served: Any) -> None:
    with talk_to(served) as slow:
        for i in range(8):
            slow.submit(f"r{i}", "x", max_tokens=200)
        slow.half_close()
        with talk_to(served) as quick:
            quick.submit("r", "abc")
            quick.half_close()
            assert text_of(quick.rest()["r"]) == "abc"
        wait_idle(served, within_s=20)
        results = slow.rest()
    assert {i: len(text_of(r)) for i, r in results.items()} == {f"r{i}": 100 for i in range(8)}
    assert all(ends(r) == 1 for r in results.values())
