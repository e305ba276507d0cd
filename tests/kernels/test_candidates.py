"""The head of rows through group maxima equals what sorting the rows finds."""

import math

import pytest
import torch

from millrace.kernels.candidates import (
    argmax_rows,
    at_least,
    count_above,
    group_maxima,
    sorted_rows,
    top_k_bounds,
)

VOCABS = pytest.mark.parametrize("vocab", [1, 7, 32, 48, 1000, 4096])


def random_rows(vocab, ties=False):
    x = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    return (x * 2).round() if ties else x


@VOCABS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_finds_the_lowest_id_of_the_greatest_value(vocab, dtype):
    x = random_rows(vocab, ties=True).to(dtype)
    values, ids = argmax_rows(x)
    assert torch.equal(values, x.amax(1))
    assert torch.equal(ids, x.float().sort(dim=1, descending=True, stable=True).indices[:, 0])


def test_argmax_reports_nan():
    x = random_rows(64)
    x[3, 50] = math.nan
    assert argmax_rows(x)[0].isnan().tolist() == [False, False, False, True, False, False]


@VOCABS
@pytest.mark.parametrize("ties", [False, True])
def test_head_above_the_bound_starts_with_the_top_k(vocab, ties):
    x = random_rows(vocab, ties)
    maxima = group_maxima(x)
    top_k = torch.tensor([1, 2, 3, vocab // 2, vocab, vocab]).clamp(1, vocab)
    values, ids = sorted_rows(6, *at_least(x, maxima, top_k_bounds(maxima, top_k)))
    expected = x.sort(dim=1, descending=True, stable=True)
    for i, k in enumerate(top_k.tolist()):
        assert torch.equal(ids[i, :k], expected.indices[i, :k])
        assert torch.equal(values[i, :k], expected.values[i, :k])


@VOCABS
def test_count_above_counts(vocab):
    x = random_rows(vocab, ties=True)
    bounds = x[:, 0].clone()
    assert torch.equal(count_above(x, group_maxima(x), bounds), (x > bounds.unsqueeze(1)).sum(1))


def test_rows_without_a_finite_value_have_no_head():
    x = torch.full((2, 64), -math.inf)
    x[1, 5] = 1.0
    head = at_least(x, group_maxima(x), torch.full((2,), -math.inf))
    values, ids = sorted_rows(2, *head)
    assert values.tolist() == [[-math.inf], [1.0]]
    assert ids.tolist() == [[0], [5]]
