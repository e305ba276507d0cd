"""Conversion between the proto and the engine's types, field by field."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from millrace.engine.core.messages import Ready, StepStats, TokenLogprobs
from millrace.engine.errors import InvalidRequest, Overloaded
from millrace.engine.input import ChatPrompt, TextPrompt, TokenPrompt
from millrace.engine.outbox import RequestOutput
from millrace.engine.output import OutputDelta, Summary
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.server import convert
from millrace.engine.server.caller import Caller
from millrace.engine.server.status import failure_of, unknown_id
from millrace.engine.server.text_calls import TextCalls
from millrace.engine.text.tokenizer import load_tokenizer
from millrace.engine.weights.locate import resolve
from millrace.v1 import admin_pb2, inference_pb2
from millrace.v1 import inference_pb2 as pb

Path_ = tuple[FieldDescriptor, ...]
READY = Ready("m", "Llama", 258, 64, 16, 8, 4, "float32", "cpu", "torch", 10)

# ---------------------------------------------------------------- requests: used or refused


def leaves(descriptor: Descriptor, path: Path_ = ()) -> Iterator[Path_]:
    """Every field of a message and of the messages in it, as a path; a map is one field."""
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry:
            yield (*path, field)
        else:
            yield from leaves(inner, (*path, field))


def put(message: Message, path: Path_, value: Any) -> None:
    """Set the field at `path`; in a repeated message, in a new element."""
    *parents, field = path
    for parent in parents:
        child = getattr(message, parent.name)
        message = child.add() if parent.is_repeated else child
    if field.message_type is not None:
        getattr(message, field.name).update(value)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    else:
        setattr(message, field.name, value)


def candidates(field: FieldDescriptor) -> list[Any]:
    """Values that a field can be seen by."""
    if field.message_type is not None:
        return [{5: 0.5}]
    by_type: dict[int, list[Any]] = {
        FieldDescriptor.CPPTYPE_BOOL: [True, False],
        FieldDescriptor.CPPTYPE_STRING: ["x"],
        FieldDescriptor.CPPTYPE_FLOAT: [0.5],
    }
    values = by_type.get(field.cpp_type, [3])
    return [values[:1]] if field.is_repeated else values


@pytest.fixture(scope="module")
def text_calls(byte_model: Path) -> TextCalls:
    tokenizer = load_tokenizer(resolve(str(byte_model)))
    engine = SimpleNamespace(tokenizer=tokenizer, chat_template=None, model=READY)
    return TextCalls(lambda: engine)  # type: ignore[arg-type,return-value]


def outcome(convert_it: Callable[[Any], Any], request: Message) -> object:
    """What becomes of a request: the result, or the field that was refused."""
    try:
        return convert_it(request)
    except InvalidRequest as error:
        return ("refused", error.field, str(error))


def converters(text_calls: TextCalls) -> dict[str, tuple[Message, Callable[[Any], Any]]]:
    """Each request message with a valid example and what the server does with it."""
    prompt = pb.Prompt(text="some text")
    ids = [65, BOS]
    return {
        "GenerateRequest": (
            pb.GenerateRequest(request_id="r", prompt=prompt),
            lambda m: convert.generation_request(
                m, convert.given_or_new_id(m.request_id), Caller()
            ),
        ),
        "ScoreRequest": (
            pb.ScoreRequest(prompt=prompt),
            lambda m: convert.score_request(m, "r", Caller()),
        ),
        "TokenizeRequest": (
            pb.TokenizeRequest(prompt=prompt),
            lambda m: asyncio.run(text_calls.tokenize(m)).SerializeToString(),
        ),
        "DetokenizeRequest": (
            pb.DetokenizeRequest(token_ids=ids),
            lambda m: asyncio.run(text_calls.detokenize(m)).SerializeToString(),
        ),
        "DrainRequest": (admin_pb2.DrainRequest(), lambda m: convert.drain_timeout_s(m, 30.0)),
    }


BOS = 256
WITHOUT_FIELDS = {"GetModelRequest", "GetLoadRequest", "FlushCacheRequest"}


def request_types() -> dict[str, Descriptor]:
    return {
        method.input_type.name: method.input_type
        for file in (inference_pb2, admin_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_every_request_field_is_used_or_refused_by_name(text_calls: TextCalls) -> None:
    ignored = []
    for name, (example, convert_it) in converters(text_calls).items():
        before = outcome(convert_it, example)
        for path in leaves(example.DESCRIPTOR):
            seen = False
            for value in candidates(path[-1]):
                changed = type(example)()
                changed.CopyFrom(example)
                put(changed, path, value)
                seen |= outcome(convert_it, changed) != before
            if not seen:
                ignored.append(".".join((name, *(field.name for field in path))))
    assert ignored == []


def test_every_request_type_is_among_those_walked(text_calls: TextCalls) -> None:
    known = set(converters(text_calls)) | WITHOUT_FIELDS | {"ConnectRequest"}
    assert set(request_types()) == known
    assert all(not request_types()[name].fields for name in WITHOUT_FIELDS)
    # connection.py matches on these
    assert [f.name for f in request_types()["ConnectRequest"].fields] == ["submit", "cancel"]


# ---------------------------------------------------------------- responses: every field is set

LOGPROBS = TokenLogprobs(7, -0.5, 2, [8, 7], [-0.25, -0.5])
SUMMARY = Summary(3, 1, 2, queue_s=0.1, first_token_s=0.2, total_s=0.3, seed=11)
OUTPUT = RequestOutput(
    "id",
    outputs=[
        OutputDelta(1, "a", [7], [LOGPROBS], finish="stop", stop_token_id=7),
        OutputDelta(2, "b", [8], finish="stop", stop_string="c"),
    ],
    prompt_logprobs=[LOGPROBS],
    summary=SUMMARY,
    error=Overloaded("full", "a field", "a limit", retry_after_s=0.5),
)
STATS = StepStats(
    step=9, running=1, waiting=2, blocks_total=8, blocks_used=3, blocks_cached=4, step_s=0.1
)


def set_leaves(message: Message) -> set[str]:
    """The full names of all fields that hold something, in all elements."""
    names = set()
    for field, value in message.ListFields():
        names.add(field.full_name)
        if field.message_type is not None:
            for element in value if field.is_repeated else [value]:
                names |= set_leaves(element)
    return names


@pytest.mark.parametrize(
    "response",
    [
        convert.connect_result(OUTPUT),
        convert.score_response([LOGPROBS], 3),
        convert.model_response(READY, eos_token_ids=[2], has_chat_template=True, version="1"),
        convert.load_response(STATS, READY, draining=True),
    ],
    ids=lambda response: response.DESCRIPTOR.name,
)
def test_every_response_field_is_filled(response: Message) -> None:
    wanted = {path[-1].full_name for path in leaves(response.DESCRIPTOR)}
    assert wanted - set_leaves(response) == set()


def test_an_output_keeps_its_values() -> None:
    response = convert.generate_response(OUTPUT)
    assert response.request_id == "id"
    first, second = response.outputs
    assert (first.index, first.text, list(first.token_ids)) == (1, "a", [7])
    assert first.finish_reason == pb.FINISH_REASON_STOP and first.stop_token_id == 7
    assert second.WhichOneof("stop_cause") == "stop_string"
    assert first.logprobs[0].rank == 2 and list(first.logprobs[0].top_ids) == [8, 7]
    assert response.summary.usage == pb.Usage(prompt_tokens=3, cached_tokens=1, output_tokens=2)
    assert response.summary.timing.queue_ms == pytest.approx(100)
    assert response.summary.timing.total_ms == pytest.approx(300)
    assert response.summary.seed == 11


def test_a_delta_in_the_middle_has_no_finish_reason() -> None:
    response = convert.generate_response(RequestOutput("id", [OutputDelta(0, "a", [7])]))
    assert response.outputs[0].finish_reason == pb.FINISH_REASON_UNSPECIFIED
    assert not response.HasField("summary")


@pytest.mark.parametrize("finish", ["stop", "length", "cancelled", "deadline", "refused", "error"])
def test_every_finish_reason_has_its_own_number(finish: Any) -> None:
    delta = convert.generate_response(RequestOutput("id", [OutputDelta(0, finish=finish)]))
    name = pb.FinishReason.Name(delta.outputs[0].finish_reason)
    assert name == f"FINISH_REASON_{finish.upper()}"


def test_a_score_sums_its_tokens() -> None:
    assert convert.score_response([LOGPROBS, LOGPROBS], 3).total_logprob == pytest.approx(-1.0)


def test_failures_name_field_limit_and_when_to_retry() -> None:
    failure = failure_of(Overloaded("full", "a field", "a limit", retry_after_s=0.5))
    assert (failure.code, failure.message) == (8, "full")
    assert (failure.field, failure.limit, failure.retry_after_ms) == ("a field", "a limit", 500)
    assert unknown_id("x").failure.code == 5


# ---------------------------------------------------------------- defaults and limits


def params(**parts: Any) -> SamplingParams:
    return convert.generation_request(
        pb.GenerateRequest(prompt=pb.Prompt(text="p"), **parts), "r", Caller()
    ).params


def test_unset_fields_take_the_documented_defaults() -> None:
    assert params() == SamplingParams(temperature=1.0, n=1, max_tokens=None, logprobs=None)


def test_a_zero_that_was_sent_is_not_an_unset_field() -> None:
    sampling = pb.SamplingParams(temperature=0.0, seed=0, n=0)
    stopping, options = pb.Stopping(max_tokens=0), pb.ResponseOptions(logprobs=0)
    got = params(sampling=sampling, stopping=stopping, response=options)
    assert (got.temperature, got.seed, got.n) == (0.0, 0, 0)
    assert (got.max_tokens, got.logprobs, got.prompt_logprobs) == (0, 0, None)


def test_logprobs_are_raw_unless_asked_otherwise() -> None:
    modes = {"UNSPECIFIED": "raw", "RAW": "raw", "PROCESSED": "processed"}
    for name, mode in modes.items():
        asked = pb.ResponseOptions(logprobs_mode=f"LOGPROBS_MODE_{name}")  # type: ignore[arg-type]
        assert params(response=asked).logprobs_mode == mode
    with pytest.raises(InvalidRequest, match="logprobs_mode"):
        params(response=pb.ResponseOptions(logprobs_mode=9))  # type: ignore[arg-type]


def test_prompts_keep_their_kind() -> None:
    ids = pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2**32 - 1]))
    assert convert.to_prompt(ids) == TokenPrompt([1, 2**32 - 1])
    assert convert.to_prompt(pb.Prompt(text="")) == TextPrompt("")
    chat = pb.Prompt(messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")]))
    prompt = convert.to_prompt(chat)
    assert isinstance(prompt, ChatPrompt) and prompt.add_generation_prompt
    chat.messages.add_generation_prompt = False
    prompt = convert.to_prompt(chat)
    assert isinstance(prompt, ChatPrompt) and not prompt.add_generation_prompt


@pytest.mark.parametrize(
    ("timeout_ms", "call_timeout_s", "expected"),
    [(None, None, None), (1500, None, 1.5), (None, 0.5, 0.5), (1500, 0.5, 0.5), (100, 0.5, 0.1)],
)
def test_the_nearer_deadline_counts(
    timeout_ms: int | None, call_timeout_s: float | None, expected: float | None
) -> None:
    proto = pb.GenerateRequest(prompt=pb.Prompt(text="p"), timeout_ms=timeout_ms)
    caller = Caller(call_timeout_s)
    assert convert.generation_request(proto, "r", caller).timeout_s == expected


@pytest.mark.parametrize(
    ("in_metadata", "in_field", "tenant"),
    [("", "", ""), ("", "acme", "acme"), ("acme", "", "acme"), ("acme", "acme", "acme")],
)
def test_a_tenant_is_named_by_the_call_or_by_the_request(
    in_metadata: str, in_field: str, tenant: str
) -> None:
    proto = pb.GenerateRequest(prompt=pb.Prompt(text="p"), tenant=in_field)
    score = pb.ScoreRequest(prompt=pb.Prompt(text="p"), tenant=in_field)
    caller = Caller(tenant=in_metadata)
    assert convert.generation_request(proto, "r", caller).tenant == tenant
    assert convert.score_request(score, "r", caller).tenant == tenant


def test_a_request_cannot_speak_for_another_tenant_than_its_call() -> None:
    proto = pb.GenerateRequest(prompt=pb.Prompt(text="p"), tenant="acme")
    with pytest.raises(InvalidRequest) as caught:
        convert.generation_request(proto, "r", Caller(tenant="other"))
    assert caught.value.field == "tenant" and "'other'" in caught.value.limit


@pytest.mark.parametrize("timeout_ms", [0, -1, 2**63 - 1, -(2**63)])
def test_a_timeout_out_of_range_is_refused(timeout_ms: int) -> None:
    for convert_it in (
        lambda: convert.drain_timeout_s(admin_pb2.DrainRequest(timeout_ms=timeout_ms), 1.0),
        lambda: convert.generation_request(
            pb.GenerateRequest(prompt=pb.Prompt(text="p"), timeout_ms=timeout_ms), "r", Caller()
        ),
    ):
        with pytest.raises(InvalidRequest) as caught:
            convert_it()
        assert caught.value.field == "timeout_ms" and caught.value.limit


@pytest.mark.parametrize("top_k", [-1, -(2**31)])
def test_a_negative_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(sampling=pb.SamplingParams(top_k=top_k))
    assert caught.value.field == "top_k"


def test_a_prompt_is_required() -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.generation_request(pb.GenerateRequest(), "r", Caller())
    assert caught.value.field == "prompt"


def test_request_ids_are_bounded_in_bytes_and_made_up_where_absent() -> None:
    assert convert.given_or_new_id("mine") == "mine"
    made_up = {convert.given_or_new_id("") for _ in range(100)}
    assert len(made_up) == 100 and all(made_up)
    assert convert.checked_request_id("é" * 128)
    for bad in ("é" * 129, ""):
        with pytest.raises(InvalidRequest) as caught:
            convert.checked_request_id(bad)
        assert caught.value.field == "request_id"
