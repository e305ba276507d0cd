"""What a request may ask for: each thing that is wrong names its field, before the device hears."""

import numpy as np
import pytest

from millrace.engine.config import MAX_PROMPT_BYTES, MAX_REQUEST_ID_BYTES
from millrace.engine.core.messages import Ready
from millrace.engine.errors import InvalidRequest
from millrace.engine.input import (
    ChatPrompt,
    GenerationRequest,
    InputProcessor,
    TextPrompt,
    TokenPrompt,
    prompt_bytes,
)
from millrace.engine.sampling_params import MAX_SEED, SamplingParams
from millrace.engine.text.chat import Message
from tests.engine.fake_core import BOS, EOS, VOCAB_SIZE, ByteTokenizer

MAX_CONTEXT = 32
MODEL = Ready("m", "a", VOCAB_SIZE, MAX_CONTEXT, 16, 5, 4, "float32", "cpu", "script", 0)


class Shouting:
    """A chat template of one line; the real one runs in a process of its own."""

    def render(self, messages, add_generation_prompt=True):
        text = "".join(f"{m.role.upper()}:{m.content};" for m in messages)
        return text + "ME:" * add_generation_prompt


@pytest.fixture
def inputs():
    return InputProcessor(ByteTokenizer(), Shouting(), MODEL, seed=1)


def request(prompt=None, timeout_s=None, request_id="r", priority=0, tenant="", **params):
    prompt = TokenPrompt([1, 2, 3]) if prompt is None else prompt
    sampling = SamplingParams(**params)
    return GenerationRequest(request_id, prompt, sampling, timeout_s, priority, tenant)


def prepare(inputs, asked, first_id=10, arrival_s=100.0):
    return inputs.prepare(asked, inputs.tokens(asked.prompt), first_id, arrival_s)


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (TextPrompt("hé"), [BOS, 104, 195, 169]),
        (TextPrompt("h", add_special=False), [104]),
        (TextPrompt(""), [BOS]),
        (TokenPrompt([0, EOS]), [0, EOS]),
        (TokenPrompt(np.array([5], np.uint64)), [5]),
        (TokenPrompt(range(3)), [0, 1, 2]),
        (ChatPrompt([Message("user", "x")]), list(b"USER:x;ME:")),
        (ChatPrompt([Message("user", "x")], add_generation_prompt=False), list(b"USER:x;")),
    ],
)
def test_every_kind_of_prompt_becomes_int32_ids(inputs, prompt, ids):
    tokens = inputs.tokens(prompt)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == ids


@pytest.mark.parametrize(
    ("prompt", "field", "limit"),
    [
        (TokenPrompt([]), "token_ids", "at least one token"),
        (TextPrompt("", add_special=False), "text", "at least one token"),
        (TokenPrompt([-1]), "token_ids", f"[0, {VOCAB_SIZE})"),
        (TokenPrompt([3, VOCAB_SIZE]), "token_ids", f"[0, {VOCAB_SIZE})"),
        (TokenPrompt([2**31]), "token_ids", f"[0, {VOCAB_SIZE})"),
        (TokenPrompt([2**70]), "token_ids", "integers"),
        (TokenPrompt([1.5]), "token_ids", "integers"),
        (TokenPrompt([True]), "token_ids", "integers"),
        (TokenPrompt([[1], [2]]), "token_ids", "integers"),
        (TokenPrompt([[1], [2, 3]]), "token_ids", "integers"),
        (TokenPrompt("12"), "token_ids", "integers"),
        (TextPrompt("a" * (MAX_PROMPT_BYTES + 1)), "text", str(MAX_PROMPT_BYTES)),
        (TextPrompt("é" * (MAX_PROMPT_BYTES // 2 + 1)), "text", str(MAX_PROMPT_BYTES)),
        (TextPrompt("\ud800"), "text", "Unicode"),
        (ChatPrompt([Message("user", "a" * MAX_PROMPT_BYTES)]), "messages", str(MAX_PROMPT_BYTES)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_a_prompt_that_cannot_be_read_names_its_field(inputs, prompt, field, limit):
    with pytest.raises(InvalidRequest) as caught:
        inputs.tokens(prompt)
    assert caught.value.field == field
    assert limit in caught.value.limit
    assert len(str(caught.value)) < 200, "the message doesn't carry the prompt back"


def test_messages_need_a_template():
    inputs = InputProcessor(ByteTokenizer(), None, MODEL)
    with pytest.raises(InvalidRequest) as caught:
        inputs.tokens(ChatPrompt([Message("user", "x")]))
    assert caught.value.field == "messages"


def test_the_vocabulary_that_counts_is_the_models():
    small = InputProcessor(ByteTokenizer(), None, with_changes(MODEL, vocab_size=100))
    with pytest.raises(InvalidRequest) as caught:
        small.tokens(TextPrompt("h", add_special=False))  # 104
    assert caught.value.field == "text"


def with_changes(model, **changes):
    return Ready(**{name: getattr(model, name) for name in model.__struct_fields__} | changes)


def test_prompt_bytes_counts_what_came():
    assert prompt_bytes(TextPrompt("hé")) == 3
    assert prompt_bytes(ChatPrompt([Message("user", "é"), Message("tool", "")])) == 10
    assert prompt_bytes(TokenPrompt([1, 2])) == 8


# ---------------------------------------------------------------- check and prepare


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (request(request_id="x" * (MAX_REQUEST_ID_BYTES + 1)), "request_id"),
        (request(request_id="é" * MAX_REQUEST_ID_BYTES), "request_id"),
        (request(timeout_s=-1.0), "timeout_s"),
        (request(timeout_s=float("nan")), "timeout_s"),
        (request(timeout_s=float("inf")), "timeout_s"),
        (request(priority=-1), "priority"),
        (request(priority=10), "priority"),
        (request(tenant="two words"), "tenant"),
        (request(tenant="x" * 65), "tenant"),
        (request(tenant="caf\u00e9"), "tenant"),
        (request(tenant="a\n"), "tenant"),
        (request(TextPrompt("a" * (MAX_PROMPT_BYTES + 1))), "text"),
        (request(n=0), "n"),
        (request(n=10_000), "n"),
        (request(temperature=float("nan")), "temperature"),
        (request(temperature=float("inf")), "temperature"),
        (request(top_p=0.0), "top_p"),
        (request(top_p=2.0), "top_p"),
        (request(top_k=-2), "top_k"),
        (request(min_p=-0.1), "min_p"),
        (request(typical_p=0.0), "typical_p"),
        (request(top_n_sigma=-1.0), "top_n_sigma"),
        (request(xtc_probability=1.1), "xtc_probability"),
        (request(xtc_threshold=-0.1), "xtc_threshold"),
        (request(repetition_penalty=0.0), "repetition_penalty"),
        (request(presence_penalty=2.5), "presence_penalty"),
        (request(frequency_penalty=float("nan")), "frequency_penalty"),
        (request(max_tokens=0), "max_tokens"),
        (request(max_tokens=2**31), "max_tokens"),
        (request(min_tokens=-1), "min_tokens"),
        (request(min_tokens=5, max_tokens=4), "min_tokens"),
        (request(seed=-1), "seed"),
        (request(seed=2**63), "seed"),
        (request(stop=[""]), "stop"),
        (request(stop=["x"] * 10_000), "stop"),
        (request(stop=["x" * 2**20]), "stop"),
        (request(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
        (request(stop_token_ids=[1] * 1000), "stop_token_ids"),
        (request(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
        (request(logit_bias={1: float("nan")}), "logit_bias"),
        (request(allowed_token_ids=[]), "allowed_token_ids"),
        (request(allowed_token_ids=[1], banned_token_ids=[1]), "banned_token_ids"),
        (request(banned_token_ids=list(range(VOCAB_SIZE))), "banned_token_ids"),
        (request(logprobs=21), "logprobs"),
        (request(prompt_logprobs=-1), "prompt_logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_parameters_name_their_field_with_and_without_tokens(inputs, asked, field):
    with pytest.raises(InvalidRequest) as caught:
        inputs.check(asked)
    assert caught.value.field == field
    assert caught.value.limit
    with pytest.raises(InvalidRequest) as caught:
        inputs.prepare(asked, np.array([1], np.int32), 0, 0.0)
    assert caught.value.field == field


def test_banning_all_but_one_token_is_allowed(inputs):
    inputs.check(request(banned_token_ids=list(range(1, VOCAB_SIZE))))


def test_a_prompt_must_leave_room_for_one_token(inputs):
    (sequence,) = prepare(inputs, request(TokenPrompt([1] * (MAX_CONTEXT - 1))))
    assert sequence.max_tokens == 1
    with pytest.raises(InvalidRequest) as caught:
        prepare(inputs, request(TokenPrompt([1] * MAX_CONTEXT)))
    assert caught.value.field == "token_ids"
    assert str(MAX_CONTEXT - 1) in caught.value.limit


@pytest.mark.parametrize(
    ("max_tokens", "allowed"), [(None, 29), (5, 5), (29, 29), (30, 29), (2**31 - 1, 29)]
)
def test_the_output_is_capped_where_the_context_ends(inputs, max_tokens, allowed):
    (sequence,) = prepare(inputs, request(max_tokens=max_tokens))
    assert sequence.max_tokens == allowed


def test_a_sequence_carries_what_the_core_needs(inputs):
    asked = request(timeout_s=2.5, seed=7, stop=["x"], stop_token_ids=[9], temperature=0.5)
    (sequence,) = prepare(inputs, asked, first_id=3, arrival_s=100.0)
    assert sequence.id == 3
    assert np.frombuffer(sequence.prompt, "<i4").tolist() == [1, 2, 3]
    assert sequence.stop_token_ids == [9, EOS]
    assert (sequence.arrival_s, sequence.deadline_s) == (100.0, 102.5)
    assert sequence.leader is None
    assert sequence.params == SamplingParams(temperature=0.5, seed=7, stop_token_ids=[9])


def test_ignore_eos_keeps_the_requests_own_stops(inputs):
    (sequence,) = prepare(inputs, request(ignore_eos=True, stop_token_ids=[9]))
    assert sequence.stop_token_ids == [9]


def test_samples_follow_their_leader_with_seeds_in_a_row(inputs):
    sequences = prepare(inputs, request(n=3, seed=MAX_SEED, prompt_logprobs=2), first_id=20)
    assert [s.id for s in sequences] == [20, 21, 22]
    assert [s.leader for s in sequences] == [None, 20, 20]
    assert [s.params.seed for s in sequences] == [MAX_SEED, 0, 1]
    assert [s.params.n for s in sequences] == [1, 1, 1]
    assert [s.params.prompt_logprobs for s in sequences] == [2, None, None]


def test_drawn_seeds_are_fixed_by_the_engines_seed_and_differ():
    def seeds(seed):
        inputs = InputProcessor(ByteTokenizer(), None, MODEL, seed)
        return [prepare(inputs, request())[0].params.seed for _ in range(4)]

    assert seeds(5) == seeds(5)
    assert len(set(seeds(5) + seeds(6) + seeds(None) + seeds(None))) == 16
    assert all(0 <= seed <= MAX_SEED for seed in seeds(None))


def test_every_sample_carries_class_and_tenant_and_the_weight_is_the_servers(inputs):
    weighing = InputProcessor(ByteTokenizer(), None, MODEL, tenant_weights={"gold": 4.0})
    asked = request(priority=9, tenant="gold", n=2)
    for new in prepare(weighing, asked):
        assert (new.priority, new.tenant, new.weight) == (9, "gold", 4.0)
    assert [new.weight for new in prepare(weighing, request(tenant="a:b/c@d.e_f-9"))] == [1.0]
    assert [new.weight for new in prepare(inputs, request(tenant="gold"))] == [1.0]
