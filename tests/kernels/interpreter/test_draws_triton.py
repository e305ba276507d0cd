"""Thousands of draws in one program of the interpreter, by the functions that the sampler's kernels
draw with: they follow the definition's distribution, and a small bias would be noticed."""

import pytest
import scipy.stats
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from millrace.kernels.drawn_logprobs import processed_row
from millrace.kernels.edits_triton import scaled_logits
from millrace.kernels.order_triton import key_of
from millrace.kernels.rows_triton import Row, row_at, rows_of
from millrace.kernels.sampling import SlotSampling, SlotValues, edit_row
from millrace.kernels.sampling_filters_triton import draw_from_list, mass_of, survivors

IDS = [0, 1024, 2048, 3072, 4096, 5120, 6144, 7168]
"""The tokens that may be drawn: their noise is all four words of two calls of the generator."""
DRAWS = 1 << 17
CHANCE = 1e-3
"""Of exceeding the limit, for a seed that nobody had chosen; with this one the test is certain."""
ASKED = {
    "plain": {"temperature": 0.8},
    "filtered": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
}


@triton.jit
def _draws_kernel(rows, p_ids, p_tokens, IDS: tl.constexpr, DRAWS: tl.constexpr):
    """Draw from the first row, at its position and those that follow it."""
    zero = tl.full((), 0, tl.int64)
    row, o_id = row_at(rows, zero), tl.load(p_ids + tl.arange(0, IDS))
    x = scaled_logits(row, o_id, o_id < rows.vocab)
    keys, best = key_of(x, o_id), tl.max(x, axis=0)
    nothing = (zero, zero, zero, zero, zero, zero, float("-inf"))
    total = tl.sum(mass_of(x, best), axis=0)
    m_kept, _, _, _ = survivors(row, keys, o_id < rows.vocab, best, total, nothing)
    positions = row.position + tl.arange(0, DRAWS)
    draws = Row(row.p_logits, row.slot, positions[None, :], row.seed, rows)
    keys = keys[:, None] + tl.zeros((1, DRAWS), tl.int64)
    _, tokens = draw_from_list(draws, keys, m_kept[:, None])
    tl.store(p_tokens + tl.arange(0, DRAWS), tokens)


def chi_square(asked, drawn=None):
    """(statistic of draws as `drawn` against the probabilities of what is `asked`, its limit)."""
    ids, vocab = torch.tensor(IDS), IDS[-1] + 1
    logits = torch.full((1, vocab), -torch.inf)
    logits[0, ids] = torch.randn(len(IDS), generator=torch.Generator().manual_seed(1)) * 1.2
    params, zero = SlotSampling.zeros(1, vocab), torch.zeros(1, dtype=torch.int64)
    params.write(0, SlotValues(seed=2024, **(drawn or asked)))
    tokens = torch.empty(DRAWS, dtype=torch.int32)
    rows = rows_of(logits, zero, zero, params)
    _draws_kernel[(1,)](rows, ids.int(), tokens, len(IDS), DRAWS)
    params.write(0, SlotValues(**asked))
    edited = edit_row(logits[0].clone(), 0, 0, params)
    expected = processed_row(edited, 0, 0, params).double().softmax(0) * DRAWS
    observed, possible = torch.bincount(tokens, minlength=vocab), expected > 0
    assert not observed[~possible].any()
    parts = (observed[possible] - expected[possible]) ** 2 / expected[possible]
    return float(parts.sum()), scipy.stats.chi2.isf(CHANCE, len(parts) - 1)


@pytest.mark.parametrize("name", ASKED)
def test_draws_follow_the_definition_s_distribution(name):
    statistic, limit = chi_square(ASKED[name])
    assert statistic < limit


@pytest.mark.parametrize("name", ASKED)
def test_a_temperature_that_is_a_tenth_off_would_be_noticed(name):
    values = ASKED[name]
    statistic, limit = chi_square(values, values | {"temperature": values["temperature"] * 1.1})
    assert statistic > limit
