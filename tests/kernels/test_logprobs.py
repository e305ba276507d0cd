"""Raw logprobs against float64, and the CPU's way against the definition."""

import math

import pytest
import torch

from millrace.kernels.logprobs import MAX_TOP, raw_logprobs_cpu, raw_logprobs_reference

LOGPROBS = pytest.mark.parametrize("logprobs", [raw_logprobs_reference, raw_logprobs_cpu])
TOLERANCE = 1e-5  # float32 logits up to 60 from the best: an ulp of 4e-6 in l - max


def random_logits(rows, vocab, scale=8.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@LOGPROBS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_match_float64(logprobs, dtype):
    logits = random_logits(5, 3001).to(dtype)
    token_ids = torch.tensor([0, 5, 3000, 1234, int(logits[4].argmax())])
    raw = logprobs(logits, token_ids, 5)
    exact = logits.double().log_softmax(1)
    chosen = exact.gather(1, token_ids.unsqueeze(1))
    assert (raw.logprobs - chosen.squeeze(1)).abs().max() < TOLERANCE
    assert torch.equal(raw.ranks, (exact > chosen).sum(1) + 1)
    assert (raw.top_logprobs - exact.gather(1, raw.top_ids)).abs().max() < TOLERANCE
    assert torch.equal(raw.top_ids, exact.sort(dim=1, descending=True, stable=True).indices[:, :5])


@LOGPROBS
def test_large_logits_keep_their_digits(logprobs):
    logits = torch.tensor([[1e6, 1e6 - 1.0, -1e6]])
    raw = logprobs(logits, torch.tensor([1]), 0)
    assert float(raw.logprobs) == pytest.approx(-1 - math.log1p(math.exp(-1)), abs=1e-6)


@LOGPROBS
def test_ties_rank_equal_and_list_by_id(logprobs):
    logits = torch.zeros(1, 100)
    logits[0, 60] = 1.0
    raw = logprobs(logits, torch.tensor([80]), 4)
    assert raw.ranks.tolist() == [2]
    assert raw.top_ids.tolist() == [[60, 0, 1, 2]]


@LOGPROBS
def test_top_reaches_into_impossible_tokens_when_it_must(logprobs):
    logits = torch.full((1, 50), -math.inf)
    logits[0, [7, 9]] = torch.tensor([1.0, 2.0])
    raw = logprobs(logits, torch.tensor([7]), 4)
    assert raw.top_ids.tolist() == [[9, 7, 0, 1]]
    assert raw.top_logprobs[0, 2:].tolist() == [-math.inf, -math.inf]


@LOGPROBS
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_rows_with_nan_or_infinity_have_no_logprobs(logprobs, odd):
    logits = random_logits(2, 64)
    logits[0, 3] = odd
    raw = logprobs(logits, torch.tensor([5, 5]), 2)
    assert raw.logprobs.isnan().tolist() == [True, False]


@LOGPROBS
def test_a_row_does_not_depend_on_its_neighbours(logprobs):
    logits, token_ids = random_logits(9, 1000), torch.arange(9)
    together = logprobs(logits, token_ids, 3)
    for i in range(9):
        alone = logprobs(logits[i : i + 1], token_ids[i : i + 1], 3)
        assert torch.equal(alone.logprobs, together.logprobs[i : i + 1])
        assert torch.equal(alone.top_logprobs, together.top_logprobs[i : i + 1])


@pytest.mark.parametrize("vocab", [1, 31, 64, 4097])
def test_cpu_gives_the_reference_s_bits(vocab):
    logits = random_logits(4, vocab, scale=1.0, seed=vocab)
    logits[1] = (logits[1] * 2).round()
    token_ids = torch.arange(4) % vocab
    num_top = min(vocab, 20)
    cpu = raw_logprobs_cpu(logits, token_ids, num_top)
    reference = raw_logprobs_reference(logits, token_ids, num_top)
    for field in ("logprobs", "ranks", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(cpu, field), getattr(reference, field))


@LOGPROBS
@pytest.mark.parametrize(
    ("vocab", "num_top", "limit"), [(1000, MAX_TOP + 1, MAX_TOP), (8, 9, 8), (1000, -1, MAX_TOP)]
)
def test_num_top_out_of_range_is_refused(logprobs, vocab, num_top, limit):
    with pytest.raises(ValueError, match=f"^num_top: expected 0 to {limit}, got {num_top}"):
        logprobs(torch.zeros(1, vocab), torch.tensor([0]), num_top)
