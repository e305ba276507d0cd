"""millrace.client against a server: text deltas, ends, errors, and what its wheel needs."""

import asyncio
import subprocess
import sys
import time
from typing import Any

import grpc
import pytest

from millrace.client import AsyncClient, CallFailed, Client, Options
from millrace.client.errors import of_failure
from millrace.client.request import generate_request
from millrace.v1 import admin_pb2
from millrace.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def target(served: Any) -> str:
    return f"127.0.0.1:{served.server.port}"


def test_generate_yields_text_as_it_comes(target: str) -> None:
    with Client(target) as client:
        stream = client.generate("hello", seed=1, max_tokens=5)
        assert "".join(stream) == "hello" == stream.answer.text
    assert stream.answer.finish_reason == "length"
    assert stream.answer.token_ids == list(b"hello")
    assert stream.answer.summary is not None
    assert stream.answer.summary.usage.prompt_tokens == 6


def test_prompts_may_be_tokens_or_messages(target: str) -> None:
    with Client(target) as client:
        assert client.generate([65, 66], seed=0, max_tokens=4).read() == "ABAB"
        chat = client.chat([("user", "hi")], seed=0, max_tokens=19)
        assert chat.read() == "<user>hi<assistant>"


def test_leaving_the_loop_cancels_the_request(target: str) -> None:
    with Client(target) as client:
        for _ in client.generate("xxxx", max_tokens=4000):
            break
        end_s = time.monotonic() + 5
        while client.admin.GetLoad(admin_pb2.GetLoadRequest()).running:
            assert time.monotonic() < end_s, "still running"
            time.sleep(0.01)


def test_a_refusal_names_the_field(target: str) -> None:
    with Client(target) as client, pytest.raises(CallFailed) as caught:
        client.generate("a", top_p=2.0).read()
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.field, caught.value.limit) == ("top_p", "(0.0, 1.0]")


def test_an_overload_says_when_to_retry(target: str) -> None:
    with Client(target) as client, pytest.raises(CallFailed) as caught:
        client.generate([253]).read()
    assert caught.value.retry_after_s == 2.5


def test_a_connection_carries_many_requests(target: str) -> None:
    with Client(target) as client:
        connection = client.connect()
        ids = [connection.submit(text, seed=1, max_tokens=3) for text in ("abc", "xyz")]
        connection.done()
        texts = dict.fromkeys(ids, "")
        for result in connection:
            for output in result.response.outputs:
                texts[result.response.request_id] += output.text
    assert list(texts.values()) == ["abc", "xyz"]


def test_a_connection_tells_failures_apart(target: str) -> None:
    with Client(target) as client:
        connection = client.connect()
        connection.cancel("nobody")
        connection.done()
        (result,) = connection
    error = of_failure(result.failure)
    assert error.code is grpc.StatusCode.NOT_FOUND and error.field == "request_id"


def test_the_asyncio_client_does_the_same(target: str) -> None:
    async def scenario() -> None:
        async with AsyncClient(target) as client:
            stream = client.generate("hello", seed=1, max_tokens=5)
            assert [text async for text in stream] and stream.answer.text == "hello"
            assert await client.chat([("user", "x")], seed=0, max_tokens=6).read() == "<user>"
            with pytest.raises(CallFailed):
                await client.generate("a", temperature=-1.0).read()
            connection = client.connect()
            first = await connection.submit("x", max_tokens=4000)
            await connection.cancel(first)
            second = await connection.submit("abc", seed=1, max_tokens=3)
            await connection.done()
            ended = [r async for r in connection if r.response.HasField("summary")]
            assert {r.response.request_id for r in ended} == {first, second}

    asyncio.run(scenario())


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token'"):
        generate_request("a", {"max_token": 3})  # type: ignore[typeddict-unknown-key]


def test_every_field_of_a_request_is_an_option() -> None:
    parts = (pb.SamplingParams, pb.Stopping, pb.ResponseOptions)
    fields = {name for part in parts for name in part.DESCRIPTOR.fields_by_name}
    own = {"timeout_ms", "request_id", "priority", "tenant"}
    assert set(Options.__annotations__) == (fields | own) - {"n"}


def test_the_client_needs_nothing_but_grpc_and_protobuf() -> None:
    heavy = ("torch", "numpy", "msgspec", "zmq", "millrace.engine", "millrace.scheduler")
    check = f"import sys, millrace.client; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
