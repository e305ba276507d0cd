"""Inference over real channels: streams, ends of all kinds, and every kind of bad input."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from millrace.engine.server import convert
from millrace.v1 import inference_pb2 as pb

BOS, EOS, VOCAB_SIZE, MAX_CONTEXT = 256, 257, 258, 4096
FAILING_TOKEN, REFUSED_TOKEN, OVERLOAD_TOKEN = 255, 254, 253  # of the scripted core
CODE = grpc.StatusCode


def text_request(text: str = "hello", seed: int = 1, **stopping: Any) -> pb.GenerateRequest:
    """With seed 1 the output repeats the text, byte by byte, then comes <bos>."""
    return pb.GenerateRequest(
        prompt=pb.Prompt(text=text),
        sampling=pb.SamplingParams(seed=seed),
        stopping=pb.Stopping(**({"max_tokens": len(text)} | stopping)),
    )


def token_request(ids: list[int], seed: int = 0, **stopping: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)),
        sampling=pb.SamplingParams(seed=seed),
        stopping=pb.Stopping(**stopping),
    )


def whole(responses: list[pb.GenerateResponse], index: int = 0) -> tuple[str, list[int], int]:
    """Text, tokens and finish reason of one output."""
    deltas = [o for r in responses for o in r.outputs if o.index == index]
    assert [d.finish_reason for d in deltas[:-1]] == [0] * (len(deltas) - 1)
    ids = [i for d in deltas for i in d.token_ids]
    return "".join(d.text for d in deltas), ids, deltas[-1].finish_reason


def failure_of(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def trailers(error: Any) -> dict[str, str]:
    return dict(error.trailing_metadata() or ())


def wait_idle(server: Any, within_s: float = 5.0) -> None:
    end_s = time.monotonic() + within_s
    while (stats := server.server.engine().stats).running + stats.waiting:
        assert time.monotonic() < end_s, "still running"
        time.sleep(0.01)


# ---------------------------------------------------------------- streams


def test_a_stream_is_the_script_and_ends_with_a_summary(served: Any) -> None:
    responses = list(served.inference.Generate(text_request("hello")))
    assert whole(responses) == ("hello", list(b"hello"), pb.FINISH_REASON_LENGTH)
    assert len(responses) >= 4  # a message for each step, not one for all
    assert [r.HasField("summary") for r in responses] == [False] * (len(responses) - 1) + [True]
    usage, timing = responses[-1].summary.usage, responses[-1].summary.timing
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (6, 3, 5)
    assert 0 < timing.first_token_ms < timing.total_ms
    assert responses[-1].summary.seed == 1


def test_an_accepted_request_tells_its_id_at_once(served: Any) -> None:
    request = text_request("x" * 100)
    request.request_id = "café 1"
    call = served.inference.Generate(request)
    assert dict(call.initial_metadata())["x-request-id"] == "caf%C3%A9 1"
    assert next(call).request_id == "café 1"
    call.cancel()


def test_a_request_without_an_id_is_given_one(served: Any) -> None:
    call = served.inference.Generate(text_request())
    (request_id,) = {response.request_id for response in call}
    assert len(request_id) == 32 and dict(call.initial_metadata())["x-request-id"] == request_id


def test_several_outputs_end_one_by_one_and_the_summary_comes_last(served: Any) -> None:
    request = text_request("abcdef", seed=0)
    request.sampling.n = 4
    responses = list(served.inference.Generate(request))
    for index in range(4):  # sample i has seed + i
        expected = ([BOS, *b"abcdef"] * 2)[index : index + 6]
        assert whole(responses, index)[1:] == (expected, pb.FINISH_REASON_LENGTH)
    assert responses[-1].summary.usage.output_tokens == 24


def test_a_stop_string_ends_the_text_before_it(served: Any) -> None:
    responses = list(served.inference.Generate(text_request("abcdefgh", stop=["cd", "zz"])))
    assert whole(responses)[0] == "ab"
    (last,) = [o for r in responses for o in r.outputs if o.finish_reason]
    assert (last.finish_reason, last.stop_string) == (pb.FINISH_REASON_STOP, "cd")
    wait_idle(served)


def test_the_end_token_is_named(served: Any) -> None:
    responses = list(served.inference.Generate(token_request([65, 66, EOS])))
    assert whole(responses) == ("AB", [65, 66, EOS], pb.FINISH_REASON_STOP)
    (last,) = [o for r in responses for o in r.outputs if o.finish_reason]
    assert last.WhichOneof("stop_cause") == "stop_token_id" and last.stop_token_id == EOS


def test_logprobs_come_where_asked_for(served: Any) -> None:
    request = text_request("abc")
    request.response.logprobs = 0
    request.response.prompt_logprobs = 2
    responses = list(served.inference.Generate(request))
    logprobs = [p for r in responses for o in r.outputs for p in o.logprobs]
    assert [p.token_id for p in logprobs] == list(b"abc") and logprobs[0].logprob == -0.5
    assert [p.token_id for r in responses for p in r.prompt_logprobs] == list(b"abc")


def test_messages_are_rendered_by_the_models_template(served: Any) -> None:
    chat = [pb.ChatMessage(role="user", content="hi")]
    request = text_request(seed=0, max_tokens=19)
    request.prompt.messages.messages.extend(chat)
    assert whole(list(served.inference.Generate(request)))[0] == "<user>hi<assistant>"
    request.prompt.messages.add_generation_prompt = False
    request.stopping.max_tokens = 8
    assert whole(list(served.inference.Generate(request)))[0] == "<user>hi"


# ---------------------------------------------------------------- ends


def test_a_cancelled_call_frees_its_request(served: Any) -> None:
    call = served.inference.Generate(text_request("x" * 100, max_tokens=4000))
    next(call), next(call)
    assert served.server.engine().stats.running == 1
    call.cancel()
    wait_idle(served)


def test_a_disconnect_frees_its_request(served: Any) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{served.server.port}")
    generate = channel.unary_stream(
        "/millrace.v1.Inference/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    call = generate(text_request("x" * 100, max_tokens=4000))
    next(call)
    channel.close()
    wait_idle(served)


def test_a_requests_own_deadline_sends_what_there_was_then_says_so(served: Any) -> None:
    request = text_request("x" * 100, max_tokens=4000)
    request.timeout_ms = 100
    responses: list[pb.GenerateResponse] = []
    error = failure_of(lambda: responses.extend(served.inference.Generate(request)))
    assert error.code() is CODE.DEADLINE_EXCEEDED
    assert "x-request-id" in trailers(error)
    wait_idle(served)


def test_partial_output_before_a_deadline_stays_valid(served: Any) -> None:
    request = text_request("x" * 100, max_tokens=4000)
    request.timeout_ms = 100
    responses = []
    with pytest.raises(grpc.RpcError):
        for response in served.inference.Generate(request):
            responses.append(response)
    text, ids, finish = whole(responses)
    assert text and set(text) == {"x"} and len(ids) >= len(text)
    assert finish == pb.FINISH_REASON_DEADLINE and responses[-1].HasField("summary")


def test_the_calls_deadline_counts_as_well(served: Any) -> None:
    call = served.inference.Generate(text_request("x" * 100, max_tokens=4000), timeout=0.1)
    assert failure_of(lambda: list(call)).code() is CODE.DEADLINE_EXCEEDED
    wait_idle(served)


def test_a_refusal_by_the_core_names_field_and_limit(served: Any) -> None:
    error = failure_of(lambda: list(served.inference.Generate(token_request([REFUSED_TOKEN]))))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert trailers(error)["millrace-field"] == "prompt"
    assert trailers(error)["millrace-limit"] == "at most 10 blocks"


def test_an_overload_says_when_to_retry(served: Any) -> None:
    error = failure_of(lambda: list(served.inference.Generate(token_request([OVERLOAD_TOKEN]))))
    assert error.code() is CODE.RESOURCE_EXHAUSTED
    assert trailers(error)["grpc-retry-pushback-ms"] == "2500"


def test_a_failed_step_ends_its_own_request_alone(served: Any) -> None:
    neighbour = served.inference.Generate(text_request("neighbour", max_tokens=30))
    responses = []
    with pytest.raises(grpc.RpcError) as caught:
        for response in served.inference.Generate(token_request([65, 66, FAILING_TOKEN])):
            responses.append(response)
    assert caught.value.code() is CODE.INTERNAL
    assert [i for r in responses for o in r.outputs for i in o.token_ids] == [65, 66]
    assert len(whole(list(neighbour))[1]) == 30


def test_a_defect_is_internal_and_tells_nothing(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(output: object) -> None:
        raise RuntimeError("secret path /etc")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "generate_response", broken)
        request = text_request()
        request.request_id = "mine\nevent=forged"
        error = failure_of(lambda: list(served.inference.Generate(request)))
    assert error.code() is CODE.INTERNAL and "secret" not in error.details()
    assert "request_id=mine%0Aevent=forged" in caplog.text and "secret path" in caplog.text
    assert whole(list(served.inference.Generate(text_request())))[0] == "hello"


# ---------------------------------------------------------------- bad input

NAN, INF = float("nan"), float("inf")


def with_sampling(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text="a"), sampling=pb.SamplingParams(**fields))


def with_stopping(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text="a"), stopping=pb.Stopping(**fields))


def with_response(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text="a"), response=pb.ResponseOptions(**fields))


def with_messages(*messages: pb.ChatMessage) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(messages=pb.ChatMessages(messages=messages)))


BAD_REQUESTS = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "no tokens": (token_request([]), "token_ids"),
    "token id out of range": (token_request([VOCAB_SIZE]), "token_ids"),
    "huge token id": (token_request([2**32 - 1]), "token_ids"),
    "prompt fills the context": (token_request([65] * MAX_CONTEXT), "token_ids"),
    "too much text": (text_request("a" * (8 * 2**20 + 1), max_tokens=1), "text"),
    "no messages": (with_messages(), "messages"),
    "unknown role": (with_messages(pb.ChatMessage(role="root", content="x")), "messages"),
    "temperature NaN": (with_sampling(temperature=NAN), "temperature"),
    "temperature inf": (with_sampling(temperature=INF), "temperature"),
    "temperature negative": (with_sampling(temperature=-0.1), "temperature"),
    "top_p 0": (with_sampling(top_p=0.0), "top_p"),
    "top_p 2": (with_sampling(top_p=2.0), "top_p"),
    "top_k negative": (with_sampling(top_k=-1), "top_k"),
    "min_p 2": (with_sampling(min_p=2.0), "min_p"),
    "repetition_penalty 0": (with_sampling(repetition_penalty=0.0), "repetition_penalty"),
    "presence_penalty 3": (with_sampling(presence_penalty=3.0), "presence_penalty"),
    "frequency_penalty NaN": (with_sampling(frequency_penalty=NAN), "frequency_penalty"),
    "seed 2^63": (with_sampling(seed=2**63), "seed"),
    "n 0": (with_sampling(n=0), "n"),
    "n 10,000": (with_sampling(n=10_000), "n"),
    "bias on an unknown id": (with_sampling(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
    "bias NaN": (with_sampling(logit_bias={1: NAN}), "logit_bias"),
    "bias on too many": (with_sampling(logit_bias=dict.fromkeys(range(2000), 1.0)), "logit_bias"),
    "unknown allowed id": (with_sampling(allowed_token_ids=[VOCAB_SIZE]), "allowed_token_ids"),
    "everything banned": (
        with_sampling(banned_token_ids=list(range(VOCAB_SIZE))),
        "banned_token_ids",
    ),
    "max_tokens 0": (with_stopping(max_tokens=0), "max_tokens"),
    "max_tokens negative": (with_stopping(max_tokens=-(2**31)), "max_tokens"),
    "min_tokens negative": (with_stopping(min_tokens=-1), "min_tokens"),
    "min above max": (with_stopping(min_tokens=5, max_tokens=4), "min_tokens"),
    "10,000 stop strings": (with_stopping(stop=["x"] * 10_000), "stop"),
    "empty stop string": (with_stopping(stop=[""]), "stop"),
    "huge stop string": (with_stopping(stop=["x" * 2**20]), "stop"),
    "too many stop ids": (with_stopping(stop_token_ids=list(range(200))), "stop_token_ids"),
    "unknown stop id": (with_stopping(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    "logprobs 21": (with_response(logprobs=21), "logprobs"),
    "prompt_logprobs -1": (with_response(prompt_logprobs=-1), "prompt_logprobs"),
    "long request id": (pb.GenerateRequest(request_id="x" * 257), "request_id"),
    "timeout 0": (pb.GenerateRequest(prompt=pb.Prompt(text="a"), timeout_ms=0), "timeout_ms"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_input_is_answered_by_field_and_limit(served: Any, name: str) -> None:
    request, field = BAD_REQUESTS[name]
    error = failure_of(lambda: list(served.inference.Generate(request)))
    assert error.code() is CODE.INVALID_ARGUMENT, error.details()
    assert trailers(error)["millrace-field"] == field
    assert trailers(error)["millrace-limit"] and field in error.details()


def test_the_largest_max_tokens_is_cut_to_the_context(served: Any) -> None:
    request = token_request([65] * (MAX_CONTEXT - 3), max_tokens=2**31 - 1)
    responses = list(served.inference.Generate(request))
    assert whole(responses) == ("AAA", [65] * 3, pb.FINISH_REASON_LENGTH)


def test_a_message_beyond_the_limit_is_refused_by_size(served: Any) -> None:
    request = text_request("a" * (17 * 2**20), max_tokens=1)
    error = failure_of(lambda: list(served.inference.Generate(request)))
    assert error.code() is CODE.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a\x02\xff\xff",
        b"\xff" * 100,
        b"\x0a\xff\xff\xff\xff\x0f",
        bytes(range(256)),
        b"\x12\x7f",
    ],
    ids=["invalid UTF-8", "ones", "length beyond the end", "all bytes", "cut short"],
)
@pytest.mark.parametrize("method", ["Generate", "Connect", "Tokenize"])
def test_bytes_that_are_no_message_are_answered_and_the_server_lives(
    served: Any, method: str, raw: bytes
) -> None:
    path = f"/millrace.v1.Inference/{method}"
    calls: dict[str, Callable[[], Any]] = {
        "Generate": lambda: list(served.channel.unary_stream(path)(raw)),
        "Connect": lambda: list(served.channel.stream_stream(path)(iter([raw]))),
        "Tokenize": lambda: served.channel.unary_unary(path)(raw),
    }
    error = failure_of(calls[method])
    assert error.code() is CODE.INVALID_ARGUMENT
    assert "Traceback" not in error.details() and "DecodeError" not in error.details()
    assert served.inference.GetModel(pb.GetModelRequest()).vocab_size == VOCAB_SIZE


def test_an_unknown_method_is_unimplemented(served: Any) -> None:
    error = failure_of(lambda: served.channel.unary_unary("/millrace.v1.Inference/Embed")(b""))
    assert error.code() is CODE.UNIMPLEMENTED


# ---------------------------------------------------------------- text, score, model


def test_tokenize_gives_ids_and_bytes(served: Any) -> None:
    request = pb.TokenizeRequest(prompt=pb.Prompt(text="aé"))
    tokens = served.inference.Tokenize(request).tokens
    assert [t.id for t in tokens] == [BOS, 97, 0xC3, 0xA9]
    assert [t.bytes for t in tokens] == [b"", b"a", b"\xc3", b"\xa9"]
    request.add_special = False
    assert [t.id for t in served.inference.Tokenize(request).tokens] == [97, 0xC3, 0xA9]


def test_tokenize_renders_messages(served: Any) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")])
    tokens = served.inference.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(messages=chat))).tokens
    assert b"".join(t.bytes for t in tokens) == b"<user>x<assistant>"


def test_tokenize_refuses_tokens(served: Any) -> None:
    request = pb.TokenizeRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1])))
    error = failure_of(lambda: served.inference.Tokenize(request))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert trailers(error)["millrace-field"] == "token_ids"


def test_detokenize_is_the_way_back(served: Any) -> None:
    ids = [BOS, *"naïve".encode(), EOS]
    detokenize = served.inference.Detokenize
    assert detokenize(pb.DetokenizeRequest(token_ids=ids)).text == "naïve"
    shown = detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
    assert shown.text == "<bos>naïve<eos>"
    assert detokenize(pb.DetokenizeRequest()).text == ""


def test_detokenize_refuses_unknown_ids(served: Any) -> None:
    request = pb.DetokenizeRequest(token_ids=[VOCAB_SIZE])
    error = failure_of(lambda: served.inference.Detokenize(request))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert trailers(error)["millrace-field"] == "token_ids"


def test_a_score_has_a_logprob_for_all_tokens_but_the_first(served: Any) -> None:
    request = pb.ScoreRequest(prompt=pb.Prompt(text="abc"), top_logprobs=2)
    score = served.inference.Score(request)
    assert [t.token_id for t in score.tokens] == list(b"abc")
    assert score.total_logprob == -3.0 and score.prompt_tokens == 4


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ScoreRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[65]))), "prompt"),
        (pb.ScoreRequest(prompt=pb.Prompt(text="ab"), top_logprobs=21), "top_logprobs"),
        (pb.ScoreRequest(), "prompt"),
    ],
    ids=["one token", "too many alternatives", "no prompt"],
)
def test_a_bad_score_is_refused(served: Any, request_: pb.ScoreRequest, field: str) -> None:
    error = failure_of(lambda: served.inference.Score(request_))
    assert error.code() is CODE.INVALID_ARGUMENT and trailers(error)["millrace-field"] == field


def test_the_model_is_described(served: Any) -> None:
    model = served.inference.GetModel(pb.GetModelRequest())
    assert (model.vocab_size, model.max_context) == (VOCAB_SIZE, MAX_CONTEXT)
    assert list(model.eos_token_ids) == [EOS] and model.has_chat_template
    assert model.architecture == "FakeForCausalLM" and model.version
