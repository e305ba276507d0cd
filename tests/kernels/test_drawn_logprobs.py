"""Logprobs of drawn tokens: each row as its slot asks, raw or of what the draw was from."""

import math

import pytest
import torch

from millrace.kernels.drawn_logprobs import drawn_logprobs_cpu, drawn_logprobs_reference
from millrace.kernels.logprobs import raw_logprobs_reference
from millrace.kernels.sampling import SampledTokens, SlotSampling, SlotValues, sample_reference
from millrace.kernels.slot_sampling import PROCESSED_LOGPROBS, RAW_LOGPROBS

SCORERS = pytest.mark.parametrize(
    "score", [drawn_logprobs_reference, drawn_logprobs_cpu], ids=["reference", "cpu"]
)
FIELDS = ("logprobs", "ranks", "top_ids", "top_logprobs")


def score_row(score, row, token_id, num_top=4, **values):
    params = SlotSampling.zeros(1, row.shape[0])
    params.write(0, SlotValues(**({"logprobs": PROCESSED_LOGPROBS} | values)))
    zero, ids = torch.zeros(1, dtype=torch.int64), torch.tensor([token_id])
    sampled = SampledTokens(ids, torch.ones(1, dtype=torch.bool))
    return score(row.unsqueeze(0), zero, zero, params, sampled, num_top)


@SCORERS
def test_dropped_tokens_count_for_nothing(score):
    row = torch.tensor([3.0, 1.0, 2.0, 0.0, -math.inf])
    scored = score_row(score, row, 2, temperature=2.0, top_k=2)
    expected = torch.tensor([1.5, 1.0]).log_softmax(0)
    torch.testing.assert_close(scored.logprobs, expected[1:], rtol=0, atol=1e-6)
    assert scored.ranks.tolist() == [2]
    assert scored.top_ids.tolist() == [[0, 2, 1, 3]]
    torch.testing.assert_close(scored.top_logprobs[0, :2], expected, rtol=0, atol=1e-6)
    assert scored.top_logprobs[0, 2:].tolist() == [-math.inf, -math.inf]


@SCORERS
def test_edits_count_and_a_greedy_row_has_no_temperature(score):
    row = torch.tensor([3.0, 1.0, 2.0])
    scored = score_row(score, row, 1, 1, bias={0: -math.inf, 1: 0.5}, top_k=1)
    expected = torch.tensor([1.5, 2.0]).log_softmax(0)
    torch.testing.assert_close(scored.logprobs, expected[:1], rtol=0, atol=1e-6)
    assert scored.top_ids.tolist() == [[2]]


@SCORERS
def test_temperature_last_scales_what_the_filters_left(score):
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    values = {"temperature": 50.0, "top_p": 0.8, "temperature_last": True}
    scored = score_row(score, row, 0, 2, **values)
    expected = (torch.tensor([2.0, 1.0]) / 50).log_softmax(0)
    torch.testing.assert_close(scored.top_logprobs[0], expected, rtol=0, atol=1e-6)


@SCORERS
@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_tokens_have_a_logprob_and_survivors_sum_to_one(sampling_case, score, seed):
    case = sampling_case(60, seed)
    inputs = (case.logits, case.slots, case.positions, case.params)
    case.params.logprobs.fill_(PROCESSED_LOGPROBS)
    sampled = sample_reference(*inputs)
    scored = score(*inputs, sampled, 60)
    drawn = sampled.ok  # of a row with three finite logits an allow-list may leave none
    assert drawn.sum() >= 9
    assert scored.logprobs[drawn].isfinite().all()
    assert (scored.ranks[drawn] >= 1).all()
    sums = scored.top_logprobs[drawn].exp().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocab", [33, 777, 4100])
def test_cpu_gives_what_the_reference_gives(sampling_case, vocab):
    case = sampling_case(vocab, vocab)
    inputs = (case.logits, case.slots, case.positions, case.params)
    sampled = sample_reference(*inputs)
    one, other = (f(*inputs, sampled, 5) for f in (drawn_logprobs_cpu, drawn_logprobs_reference))
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(one, field), getattr(other, field), rtol=0, atol=0, equal_nan=True
        )


@SCORERS
def test_each_row_is_scored_as_its_slot_asks(score):
    row = torch.tensor([3.0, 1.0, 2.0, 0.0])
    params = SlotSampling.zeros(3, 4)
    for slot, kind in enumerate((RAW_LOGPROBS, 0, PROCESSED_LOGPROBS)):
        params.write(slot, SlotValues(temperature=2.0, top_k=2, bias={3: 9.0}, logprobs=kind))
    inputs = (row.expand(3, 4), torch.arange(3), torch.arange(3), params)
    sampled = sample_reference(*inputs)
    sampled.token_ids[:] = 0
    scored = score(*inputs, sampled, 2)
    assert torch.equal(row, torch.tensor([3.0, 1.0, 2.0, 0.0]))  # edits are made to a copy
    raw = raw_logprobs_reference(row[None], sampled.token_ids[:1], 2)
    assert scored.logprobs[0] == raw.logprobs[0]
    assert scored.top_ids[0].tolist() == [0, 2]
    assert scored.logprobs[1].isnan()
    expected = torch.tensor([4.5, 1.5]).log_softmax(0)
    torch.testing.assert_close(scored.top_logprobs[2], expected, rtol=0, atol=1e-6)
    assert scored.top_ids[2].tolist() == [3, 0]
    assert scored.ranks.tolist()[::2] == [1, 2]


@SCORERS
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_rows_without_a_distribution_have_nan(score, odd):
    row = torch.tensor([1.0, odd, 2.0])
    assert score_row(score, row, 0, 0, temperature=1.0, top_p=0.5).logprobs.isnan().all()
