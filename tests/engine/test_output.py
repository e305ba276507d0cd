"""From token ids to text: cuts between deltas change nothing, stops end where they must."""

import codecs
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.core.messages import Delta, TokenLogprobs
from millrace.engine.errors import InvalidRequest, Overloaded, StepFailed
from millrace.engine.output import OutputDelta, RequestProgress, SequenceOutput, failure
from millrace.engine.sampling_params import SamplingParams
from tests.engine.fake_core import BOS, EOS, VOCAB_SIZE, ByteTokenizer

TOKENIZER = ByteTokenizer()


def sequence(**params):
    return SequenceOutput(0, SamplingParams(**params), TOKENIZER)


def feed(output, ids, cuts=(), finish=None, stop_token_id=None, logprobs=False):
    """Everything that `output` says of `ids`, cut into deltas, merged into one."""
    edges = [0, *sorted(cuts), len(ids)]
    pieces = [ids[a:b] for a, b in pairwise(edges)]
    merged = OutputDelta(0)
    for i, piece in enumerate(pieces):
        delta = Delta(1, list(piece))
        if logprobs:
            delta.logprobs = [TokenLogprobs(t, -1.0, 1, [], []) for t in piece]
        if i == len(pieces) - 1:
            delta.finish, delta.stop_token_id = finish, stop_token_id
        said = output.apply(delta)
        if not said.empty:
            assert merged.finish is None, "nothing follows the end"
            merged.merge(said)
    return merged


def test_text_follows_the_tokens():
    output = sequence()
    assert output.apply(Delta(1, [104, 105])) == OutputDelta(0, "hi", [104, 105])
    last = output.apply(Delta(1, [33], finish="length"))
    assert last == OutputDelta(0, "!", [33], finish="length")
    assert output.num_tokens == 3


def test_half_a_character_waits_and_ends_as_a_replacement():
    output = sequence()
    assert output.apply(Delta(1, [0xC3])).text == ""
    assert output.apply(Delta(1, [0xA9, 0xC3])).text == "é"
    assert output.apply(Delta(1, [], finish="cancelled")).text == "\ufffd"


def test_the_token_that_ends_an_output_is_a_token_but_no_text():
    said = feed(sequence(), [104, EOS], finish="stop", stop_token_id=EOS)
    assert (said.text, said.token_ids, said.stop_token_id) == ("h", [104, EOS], EOS)
    said = feed(sequence(), [104, 105], finish="stop", stop_token_id=105)
    assert (said.text, said.token_ids) == ("h", [104, 105])


def test_the_token_that_ends_an_output_is_text_where_stops_are_included():
    params = {"include_stop_str_in_output": True}
    said = feed(sequence(**params), [104, 105], finish="stop", stop_token_id=105)
    assert said.text == "hi"
    said = feed(
        sequence(**params, skip_special_tokens=False), [104, EOS], finish="stop", stop_token_id=EOS
    )
    assert said.text == "h<eos>"


def test_special_tokens_are_text_only_on_demand():
    assert feed(sequence(), [BOS, 104]).text == "h"
    assert feed(sequence(skip_special_tokens=False), [BOS, 104]).text == "<bos>h"


def test_a_stop_string_across_deltas_ends_the_output_and_takes_its_text_back():
    output = sequence(stop=["END"])
    assert output.apply(Delta(1, list(b"go E"))).text == "go "
    assert output.apply(Delta(1, list(b"N"))).text == ""
    last = output.apply(Delta(1, list(b"D and more")))
    assert last == OutputDelta(0, "", list(b"D"), finish="stop", stop_string="END")
    assert output.apply(Delta(1, [1], finish="length")).empty
    assert output.num_tokens == 6


def test_what_looked_like_a_stop_string_is_told_in_the_end():
    output = sequence(stop=["END"])
    assert feed(output, list(b"go EN"), finish="length").text == "go EN"


def test_a_stop_string_can_be_left_in_the_text():
    said = feed(sequence(stop=["END"], include_stop_str_in_output=True), list(b"go END now"))
    assert (said.text, said.stop_string) == ("go END", "END")


def test_logprobs_are_cut_with_the_tokens():
    said = feed(sequence(stop=["b"]), list(b"abc"), logprobs=True)
    assert [entry.token_id for entry in said.logprobs] == said.token_ids == list(b"ab")


def test_stop_strings_wait_for_min_tokens():
    said = feed(sequence(stop=["a"], min_tokens=2), list(b"aaba"))
    assert (said.text, said.token_ids) == ("aab", list(b"aaba"))


def test_a_stop_string_of_the_replacement_character_ends_a_broken_output():
    said = feed(sequence(stop=["\ufffd"]), [104, 0xC3], finish="length")
    assert (said.text, said.finish, said.stop_string) == ("h", "stop", "\ufffd")


@st.composite
def _outputs(draw):
    alphabet = st.sampled_from([*b"ab", 0xC3, 0xA9, 0xF0, BOS, 0xFF])
    ids = draw(st.lists(alphabet | st.integers(0, VOCAB_SIZE - 1), max_size=24))
    cuts = draw(st.lists(st.integers(0, max(0, len(ids) - 1)), max_size=8))
    params = SamplingParams(
        stop=draw(st.lists(st.text("abé\ufffd", min_size=1, max_size=4), max_size=3)),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        min_tokens=draw(st.integers(0, 4)),
    )
    finish = draw(st.sampled_from(["length", "cancelled", "stop"]))
    return ids, cuts, params, finish


@settings(max_examples=300, deadline=None)
@given(_outputs())
def test_any_cut_into_deltas_says_the_same(case):
    ids, cuts, params, finish = case
    stop_token = ids[-1] if finish == "stop" and ids else None

    def said(cuts):
        output = SequenceOutput(0, params, TOKENIZER)
        return feed(output, ids, cuts, finish, stop_token, logprobs=True)

    whole, cut = said(()), said(cuts)
    cut.logprobs, whole.logprobs = cut.logprobs or [], whole.logprobs or []
    assert cut == whole
    if params.min_tokens == 0:
        assert whole == oracle(ids, params, finish, stop_token, whole.logprobs)


def oracle(ids, params, finish, stop_token, logprobs):
    """The same from the definition: decode every prefix and look for the first stop in it."""
    spoken = ids if stop_token is None or params.include_stop_str_in_output else ids[:-1]
    for count in range(1, len(spoken) + 2):
        ended = count > len(spoken)  # then what is no whole character counts as well
        text = TOKENIZER.decode(spoken[:count], params.skip_special_tokens)
        whole = text if ended else without_open_character(spoken[:count], params)
        matches = [
            (whole.find(stop) + len(stop), -len(stop), stop)
            for stop in params.stop
            if stop in whole
        ]
        if matches:
            end, _, stop = min(matches)
            kept = whole[:end] if params.include_stop_str_in_output else whole[: end - len(stop)]
            tokens = ids if ended else ids[:count]
            return OutputDelta(0, kept, tokens, logprobs, "stop", None, stop)
    text = TOKENIZER.decode(spoken, params.skip_special_tokens)
    return OutputDelta(0, text, ids, logprobs, finish, stop_token)


def without_open_character(ids, params):
    """The text so far, less a last character that isn't whole."""
    data = TOKENIZER.text_bytes(ids, params.skip_special_tokens)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


# ---------------------------------------------------------------- requests


def test_progress_counts_and_times_over_all_outputs():
    progress = RequestProgress(SamplingParams(n=2), TOKENIZER, arrival_s=100.0)
    progress.prompt_tokens, progress.seed = 7, 42
    first = Delta(1, [104], cached_tokens=4, scheduled_s=101.0)
    progress.apply(0, first, 102.0)
    progress.apply(1, Delta(2, [104], cached_tokens=6, scheduled_s=101.5), 102.0)
    progress.apply(0, Delta(1, [105]), 102.5)
    progress.apply(0, Delta(1, [106], finish="length"), 104.0)
    assert not progress.finished
    progress.apply(1, Delta(2, [105, EOS], finish="stop", stop_token_id=EOS), 105.0)
    assert progress.finished
    summary = progress.summary(106.0)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (7, 4, 6)
    assert (summary.queue_s, summary.first_token_s, summary.total_s) == (1.0, 2.0, 6.0)
    assert summary.seed == 42
    finished = progress.finished_request(106.0)
    assert finished.outcome == "length"
    assert (finished.queue_s, finished.prefill_s, finished.first_token_s) == (1.0, 1.0, 2.0)
    assert list(finished.itl_s) == [0.5, 1.5, 3.0]


def test_a_request_that_never_ran_has_no_times():
    progress = RequestProgress(SamplingParams(), TOKENIZER, arrival_s=100.0)
    (last,) = progress.end("deadline")
    assert last == OutputDelta(0, finish="deadline")
    assert progress.end("cancelled") == []
    finished = progress.finished_request(103.0)
    assert (finished.outcome, finished.total_s) == ("deadline", 3.0)
    assert finished.queue_s is finished.prefill_s is finished.first_token_s is None


@pytest.mark.parametrize(
    ("delta", "kind"),
    [
        (Delta(1, [], finish="error", error="NaN"), StepFailed),
        (Delta(1, [], finish="refused", error="no", field="f", limit="l"), InvalidRequest),
        (
            Delta(1, [], finish="refused", error="no", field="f", limit="l", retry_after_s=2.0),
            Overloaded,
        ),
    ],
)
def test_failures_become_the_errors_that_they_stand_for(delta, kind):
    error = failure(delta)
    assert type(error) is kind
    assert str(error) == delta.error
    if delta.finish == "refused":
        assert (error.field, error.limit) == ("f", "l")
    if kind is Overloaded:
        assert error.retry_after_s == 2.0


@pytest.mark.parametrize("finish", [None, "stop", "length", "cancelled", "deadline"])
def test_normal_ends_are_no_errors(finish):
    assert failure(Delta(1, [], finish=finish)) is None
