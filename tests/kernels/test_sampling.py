"""Sampling: the definition against formulas and transformers; the CPU against the definition."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from millrace.kernels.candidates import group_maxima
from millrace.kernels.filters import Filters, kept_tokens
from millrace.kernels.rng import xtc_coins
from millrace.kernels.sampling import SlotSampling, SlotValues, edit_row, sample_reference
from millrace.kernels.sampling_cpu import sample_cpu
from millrace.kernels.sampling_rare_cpu import kept_of_row

SAMPLERS = pytest.mark.parametrize("sample", [sample_reference, sample_cpu])
FIELDS = ("token_ids", "ok")
DRAWS = 6000
RARE = {"top_n_sigma", "typical_p", "xtc_probability"}  # a row at a time


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def one_slot(vocab, **values):
    params = SlotSampling.zeros(1, vocab)
    params.write(0, SlotValues(**values))
    return params


def sample_row(sample, row, position=0, **values):
    """(token id, ok) of one row of logits under one request's parameters."""
    params = one_slot(row.shape[0], **values)
    sampled = sample(row.unsqueeze(0), int64(0), int64(position), params)
    return int(sampled.token_ids), bool(sampled.ok)


def draw_many(sample, row, draws=DRAWS, **values):
    """Token ids of one row at `draws` successive positions."""
    logits = row.expand(draws, -1)
    slots = torch.zeros(draws, dtype=torch.int64)
    return sample(logits, slots, torch.arange(draws), one_slot(row.shape[0], **values)).token_ids


def assert_same(one, other):
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(one, field), getattr(other, field), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [33, 777, 4096, 9000])
def test_cpu_gives_what_the_reference_gives(sampling_case, vocab, seed):
    case = sampling_case(vocab, seed)
    inputs = (case.logits, case.slots, case.positions, case.params)
    assert_same(sample_cpu(*inputs), sample_reference(*inputs))


@SAMPLERS
def test_a_row_does_not_depend_on_its_neighbours_or_place(sampling_case, sample):
    case = sampling_case(5000, 11)
    together = sample(case.logits, case.slots, case.positions, case.params)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 10
    for rows in (*torch.arange(10).split(1), shuffled):
        apart = sample(case.logits[rows], case.slots[rows], case.positions[rows], case.params)
        for field in FIELDS:
            expected = getattr(together, field)[rows]
            torch.testing.assert_close(
                getattr(apart, field), expected, rtol=0, atol=0, equal_nan=True
            )


@SAMPLERS
def test_a_row_does_not_depend_on_its_slot(sample):
    row = torch.randn(1, 500, generator=torch.Generator().manual_seed(3))
    values = SlotValues(temperature=1.0, seed=5, top_p=0.95, presence_penalty=0.3, output_ids=[4])
    tokens = set()
    for slot in (0, 6):
        params = SlotSampling.zeros(7, 500)
        params.write(slot, values)
        tokens.add(int(sample(row, int64(slot), int64(9), params).token_ids))
    assert len(tokens) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@SAMPLERS
def test_draws_differ_by_seed_and_position_and_repeat(sample, dtype):
    row = torch.zeros(4096, dtype=dtype)
    tokens = {
        (seed, position): sample_row(sample, row, position, temperature=1.0, seed=seed)
        for seed in (1, 2, -1)
        for position in (0, 1, 2)
    }
    assert len(set(tokens.values())) == len(tokens)
    assert tokens[2, 1] == sample_row(sample, row, 1, temperature=1.0, seed=2)


EXACT_DISTRIBUTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_n_sigma": {"top_n_sigma": 1.2},
    "typical_p": {"typical_p": 0.6},
    "xtc": {"xtc_probability": 0.4, "xtc_threshold": 0.05},
    "all filters": {
        "temperature": 1.4,
        "top_n_sigma": 2.5,
        "top_k": 20,
        "typical_p": 0.95,
        "top_p": 0.9,
        "min_p": 0.08,
        "xtc_probability": 0.6,
        "xtc_threshold": 0.1,
    },
    "temperature last": {"temperature": 2.0, "temperature_last": True, "top_p": 0.7},
    "edits": {
        "bias": {3: 2.0, 5: -math.inf},
        "repetition_penalty": 1.4,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "prompt_ids": [1, 2, 3],
        "output_ids": [2, 7, 7],
    },
}


def exact_distribution(row, values):
    """Probabilities in float64, by the formulas in the order of the module's docstring."""
    x = edit_row(row.clone(), 0, 0, one_slot(row.shape[0], **values)).double()
    last = values.get("temperature_last", False)
    measured = x if last else x / values["temperature"]
    order = measured.argsort(descending=True, stable=True)
    order = order[x[order].isfinite()]
    lowest = x.max() - values.get("top_n_sigma", math.inf) * x[order].std(correction=0)
    order = order[x[order] >= lowest]
    order = order[: values.get("top_k") or len(order)]
    p = measured[order].softmax(0)
    surprise = -p.log()
    distance = (surprise - (p * surprise).sum()).abs()
    nearest = distance.argsort(stable=True)
    typical = nearest[p[nearest].cumsum(0) - p[nearest] < values.get("typical_p", 1.0)]
    order = order[typical.sort().values]
    p = measured[order].softmax(0)
    order = order[p.cumsum(0) - p < values.get("top_p", 1.0)]
    p = measured[order].softmax(0)
    order = order[p >= values.get("min_p", 0.0) * p.max()]
    drawn = x / values["temperature"]
    whole = torch.zeros_like(x).index_put_((order,), drawn[order].softmax(0))
    coin = values.get("xtc_probability", 0.0)
    top = int((measured[order].softmax(0) >= values.get("xtc_threshold", 1.0)).sum())
    rest = order[max(0, top - 1) :]
    shortened = torch.zeros_like(x).index_put_((rest,), drawn[rest].softmax(0))
    return (1 - coin) * whole + coin * shortened


@pytest.mark.parametrize("name", EXACT_DISTRIBUTIONS)
def test_draws_follow_the_exact_distribution(name):
    values = {"temperature": 1.0, "seed": 2024} | EXACT_DISTRIBUTIONS[name]
    row = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 1.5
    draws = DRAWS // 4 if RARE & set(values) else DRAWS
    expected = exact_distribution(row, values) * draws
    observed = torch.bincount(draw_many(sample_cpu, row, draws, **values), minlength=32)
    possible = expected > 0
    assert not observed[~possible].any()
    assert possible.sum() > 1
    result = scipy.stats.chisquare(observed[possible].numpy(), expected[possible].numpy())
    assert result.pvalue > 1e-3


def test_rare_tokens_come_as_often_as_they_should():
    row = torch.zeros(16384)
    row[7] = 16.0  # all others together: 16383 * exp(-16) = 0.18 % of it
    rare = 16383 * math.exp(-16)
    tokens = draw_many(sample_cpu, row, draws=4000, temperature=1.0, seed=6)
    others = int((tokens != 7).sum())
    assert scipy.stats.binomtest(others, 4000, rare / (1 + rare)).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_kept_sets_are_those_of_transformers(seed):
    row = torch.randn(1, 2000, generator=torch.Generator().manual_seed(seed)) * 2.5
    for top_k in (1, 7, 300, 2000):
        assert_kept(TopKLogitsWarper(top_k), row, Filters(top_k=top_k))
    for mass in (0.05, 0.5, 0.9, 0.999):
        mass = float(torch.tensor(mass))
        assert_kept(TopPLogitsWarper(mass), row, Filters(top_p=mass))
        assert_kept(TypicalLogitsWarper(mass), row, Filters(typical_p=mass))
    for min_p in (0.001, 0.05, 0.9, 1.0):
        assert_kept(MinPLogitsWarper(min_p), row, Filters(min_p=min_p))
    chain = (TopKLogitsWarper(40), TypicalLogitsWarper(0.9), TopPLogitsWarper(0.8))
    filters = Filters(top_k=40, typical_p=0.9, top_p=0.8)
    assert_kept(lambda _, x: chain[2](None, chain[1](None, chain[0](None, x))), row, filters)


def assert_kept(warper, row, filters):
    theirs = warper(None, row.clone())[0].isfinite().nonzero().squeeze(1)
    assert torch.equal(kept_tokens(row[0], filters).sort().values, theirs)


RARE_FILTERS = [
    *(Filters(top_n_sigma=n, top_p=p) for n in (0.5, 3.0, 50.0) for p in (1.0, 0.8)),
    *(Filters(typical_p=p) for p in (1e-6, 0.3, 0.9, 0.999)),
    *(Filters(typical_p=0.9, top_n_sigma=n, top_p=0.8, xtc_threshold=0.01) for n in (0.0, 2.0)),
    *(Filters(xtc_threshold=t) for t in (0.0, 1e-4, 0.1, 0.6)),
    Filters(top_k=40, typical_p=0.7, xtc_threshold=0.02),
    Filters(top_k=10**6, typical_p=0.95, min_p=0.01),
    Filters(top_n_sigma=2.0, min_p=0.05, xtc_threshold=0.1),
    Filters(2.0, 30, 0.95, 0.9, 0.02, 0.05),
]


@pytest.mark.parametrize("vocab", [33, 777, 4096, 9000])
def test_rare_filters_keep_on_the_cpu_what_the_definition_keeps(sampling_rows, vocab):
    for row in sampling_rows(vocab, vocab):
        maxima = group_maxima(row.unsqueeze(0))[0]
        for filters in RARE_FILTERS:
            expected = kept_tokens(row, filters).sort().values
            assert torch.equal(kept_of_row(row, maxima, filters), expected), filters


def llama_cpp_top_n_sigma(logits, n):
    """llama_sampler_top_n_sigma_apply: logits more than n deviations below the best are dropped."""
    valid = logits[logits > -np.inf]
    deviation = np.sqrt(((valid - valid.mean()) ** 2).mean())
    return np.flatnonzero((logits >= valid.max() - n * deviation) & (logits > -np.inf))


def llama_cpp_xtc(logits, threshold):
    """llama_sampler_xtc_apply, once the dice have said yes; without the check for min_keep."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    last = 0
    for i in range(len(p)):
        if p[i] < threshold:
            break
        last = i
    return np.sort(order[last:] if threshold <= 0.5 else order)


@pytest.mark.parametrize("seed", range(3))
def test_kept_sets_are_those_of_llama_cpp(seed):
    row = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * 2.5
    masked = row.masked_fill(torch.arange(2000) % 3 == 0, -math.inf)
    for n in (0.01, 0.5, 1.0, 2.0, 5.0):
        for logits in (row, masked):
            kept = kept_tokens(logits, Filters(top_n_sigma=n)).sort().values
            assert np.array_equal(kept, llama_cpp_top_n_sigma(logits.double().numpy(), n))
    for threshold in (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7):
        kept = kept_tokens(row, Filters(xtc_threshold=threshold)).sort().values
        assert np.array_equal(kept, llama_cpp_xtc(row.double().numpy(), threshold))


@SAMPLERS
def test_temperature_last_measures_the_filters_without_it(sample):
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])  # p = 0.64, 0.24, 0.09, 0.03
    hot = {"temperature": 50.0, "top_p": 0.8}
    assert set(draw_many(sample, row, 200, **hot).tolist()) == {0, 1, 2, 3}
    assert set(draw_many(sample, row, 200, **hot, temperature_last=True).tolist()) == {0, 1}
    assert sample_row(sample, row, temperature=0.0, temperature_last=True) == (0, True)


def test_xtc_falls_as_often_as_asked_and_by_seed_and_position_alone():
    seeds, positions = torch.zeros(DRAWS, dtype=torch.int64), torch.arange(DRAWS)
    coins = xtc_coins(seeds, positions)
    assert scipy.stats.kstest(coins.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(coins[100:103], xtc_coins(seeds[:3], positions[100:103]))
    assert not torch.equal(coins, xtc_coins(seeds + 1, positions))
    row = torch.tensor([3.0, 2.9, 0.0])
    never = draw_many(sample_cpu, row, 200, temperature=1.0, xtc_probability=0.0)
    always = draw_many(sample_cpu, row, 200, temperature=1.0, xtc_probability=1.0)
    assert 0 in never and 0 not in always and 1 in always


@SAMPLERS
def test_of_tied_tokens_the_lowest_ids_are_kept(sample):
    flat = torch.zeros(300)
    assert kept_tokens(flat, Filters(top_k=50)).tolist() == list(range(50))
    assert kept_tokens(flat, Filters(top_p=0.1)).tolist() == list(range(30))
    assert kept_tokens(flat, Filters(typical_p=0.1)).tolist() == list(range(300))
    assert kept_tokens(flat, Filters(xtc_threshold=0.001)).tolist() == [299]
    assert set(draw_many(sample, flat, 400, temperature=1.0, top_k=3).tolist()) == {0, 1, 2}
    four = torch.zeros(4)  # two of them weigh exactly a half: the third is not needed
    assert set(draw_many(sample, four, 400, temperature=1.0, top_p=0.5).tolist()) == {0, 1}
    assert sample_row(sample, flat) == (0, True)
    signed = torch.tensor([-1.0, -0.0, 0.0])
    assert sample_row(sample, signed) == (1, True)
    assert sample_row(sample, signed, temperature=1.0, top_k=1) == (1, True)


MODES = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("values", MODES, ids=str)
@SAMPLERS
def test_rows_without_an_answer_are_reported_alone(sample, values):
    nan, inf = math.nan, math.inf
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 13] = nan
    logits[2] = -inf
    logits[3, 5] = logits[3, 9] = inf
    logits[4] = -inf
    logits[4, 8] = -3e38
    slots, positions = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    sampled = sample(logits, slots, positions, one_slot(40, **values))
    assert sampled.ok.tolist() == [True, False, False, True, True, True]
    assert sampled.token_ids[1:5].tolist() == [0, 0, 5, 8]
    alone = sample(logits[5:], slots[5:], positions[5:], one_slot(40, **values))
    assert sampled.token_ids[5] == alone.token_ids[0]


@pytest.mark.parametrize("values", MODES, ids=str)
@SAMPLERS
def test_bans_that_leave_nothing_are_reported(sample, values):
    row = torch.tensor([1.0, -math.inf, 2.0])
    bias = {0: -math.inf, 2: -math.inf}
    assert sample_row(sample, row, bias=bias, **values) == (0, False)
    assert sample_row(sample, row, allowed_ids=[1], **values) == (0, False)


@pytest.mark.parametrize("values", MODES, ids=str)
@SAMPLERS
def test_a_banned_nan_or_infinity_still_fails_the_row(sample, values):
    for odd in (math.nan, math.inf):
        row = torch.tensor([1.0, odd, 2.0])
        assert sample_row(sample, row, bias={1: -math.inf}, **values) == (0, False)
        stop = {"stop_ids": [1], "min_position": 5}
        assert sample_row(sample, row, **stop, **values) == (0, False)


@SAMPLERS
def test_filters_at_their_limits(sample):
    row = torch.randn(3000, generator=torch.Generator().manual_seed(4))
    best = (int(row.argmax()), True)
    for values in (
        {"top_p": 1e-9},
        {"top_k": 1},
        {"min_p": 1.0},
        {"top_n_sigma": 1e-9},
        {"temperature": 1e-6},
    ):
        assert sample_row(sample, row, **({"temperature": 2.0, "seed": 8} | values)) == best
    free = sample_row(sample, row, temperature=2.0, seed=8)
    for values in ({"top_k": 3000}, {"top_k": 10**9}, {"min_p": 1e-30}, {"top_n_sigma": 99.0}):
        assert sample_row(sample, row, temperature=2.0, seed=8, **values) == free
    huge = sample_row(sample, row * 1e35, temperature=1e-4, top_k=5)  # overflows to +inf
    assert huge[1]


@SAMPLERS
def test_stop_ids_are_banned_until_the_minimum_position(sample):
    row = torch.tensor([0.0, 5.0, 1.0, 4.0])
    values = {"stop_ids": [1, 3], "min_position": 10}
    assert [sample_row(sample, row, at, **values)[0] for at in (0, 9, 10)] == [2, 2, 1]


@SAMPLERS
def test_allowed_ids_ban_all_others(sample):
    row = torch.randn(500, generator=torch.Generator().manual_seed(5))
    tokens = draw_many(sample, row, 300, temperature=1.0, allowed_ids=[7, 400])
    assert set(tokens.tolist()) == {7, 400}
    assert sample_row(sample, row, allowed_ids=[7, 400], bias={7: 50.0}) == (7, True)


def test_edits_follow_their_formulas():
    row = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 2.0])
    params = one_slot(
        6,
        bias={5: 1.5},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        prompt_ids=[0, 1],
        output_ids=[2, 2, 3],
    )
    # Repetition halves or doubles 0 to 3; then 2 was said twice (0.5 + 0.5) and 3 once (0.75).
    assert edit_row(row, 0, 0, params).tolist() == [1.0, -4.0, 0.0, -4.75, 2.0, 3.5]


@SAMPLERS
def test_recorded_tokens_count_as_output(sample):
    params = one_slot(4, presence_penalty=2.0)
    logits, slot, tokens = torch.tensor([[3.0, 2.0, 1.5, 0.0]]), int64(0), []
    for position in range(4):
        sampled = sample(logits, slot, int64(position), params)
        params.record(slot, sampled.token_ids)
        tokens.append(int(sampled.token_ids))
    assert tokens == [0, 1, 2, 0]
    assert params.output_counts[0].tolist() == [2, 1, 1, 0]


@SAMPLERS
def test_logits_are_left_alone_and_may_be_strided(sample):
    wide = torch.randn(3, 200, generator=torch.Generator().manual_seed(6))
    logits, before = wide[:, :100], wide.clone()
    params = one_slot(100, temperature=0.9, top_k=9, bias={1: 1.0}, stop_ids=[2], min_position=9)
    inputs = (torch.zeros(3, dtype=torch.int64), torch.arange(3), params)
    strided = sample(logits, *inputs)
    assert torch.equal(wide, before)
    assert_same(strided, sample(logits.contiguous(), *inputs))


@SAMPLERS
def test_an_empty_batch_gives_an_empty_answer(sample):
    none = torch.empty(0, dtype=torch.int64)
    sampled = sample(torch.empty(0, 50), none, none, one_slot(50))
    assert sampled.token_ids.shape == (0,)
    assert sampled.ok.shape == (0,)


@SAMPLERS
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", {"logits": torch.zeros(2, 51)}),
        ("logits", {"logits": torch.zeros(2, 50, dtype=torch.float64)}),
        ("slots", {"slots": torch.zeros(2)}),
        ("positions", {"positions": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_malformed_input_is_refused_by_name(sample, name, change):
    inputs = {
        "logits": torch.zeros(2, 50),
        "slots": torch.zeros(2, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int64),
        "params": one_slot(50),
    }
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample(**(inputs | change))


@SAMPLERS
def test_a_slot_that_does_not_exist_is_refused(sample):
    with pytest.raises(IndexError):
        sample(torch.zeros(1, 50), int64(1), int64(0), one_slot(50))
