"""Attention on a CPU against its definition; every cache entry outside a context is a NaN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.kernels.attention import (
    AttentionBatch,
    paged_attention_reference,
    prepare_attention,
)
from millrace.kernels.attention_cpu import (
    MAX_GROUP_SCORES,
    padded_length,
    paged_attention_cpu,
    prepare_attention_cpu,
)

SCALE = 0.125
# float32 sums in another order; 16-bit rounds the weights as well as the result.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def attend(case, window=None, softcap=None):
    prepared = prepare_attention_cpu(case.batch, case.block_size, window)
    return paged_attention_cpu(
        case.q, case.k_cache, case.v_cache, prepared, scale=SCALE, softcap=softcap
    )


def assert_is_defined_attention(case, window=None, softcap=None):
    prepared = prepare_attention(case.batch, case.block_size, window)
    expected = paged_attention_reference(
        case.q, case.k_cache, case.v_cache, prepared, scale=SCALE, softcap=softcap
    )
    tolerance = TOLERANCE[case.q.dtype]
    actual = attend(case, window, softcap)
    assert actual.shape == case.q.shape and actual.dtype == case.q.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


RAGGED = ([33, 1, 64, 300, 16, 17, 300], None)
MIXED = ([65, 2, 40, 130, 64], [1, 1, 40, 63, 64])
CHUNKS = ([1, 63, 64, 65, 200], [1, 63, 64, 65, 65])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 1, 16, 40])
@pytest.mark.parametrize("rows", [RAGGED, MIXED, CHUNKS], ids=["decodes", "mixed", "prefills"])
def test_rows_of_all_kinds(attention_case, rows, window, dtype):
    assert_is_defined_attention(attention_case(*rows, dtype=dtype), window)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blocks_that_left_the_window_are_not_read(attention_case, dtype):
    case = attention_case([150, 33, 150, 20], [1, 1, 20, 20], dtype=dtype)
    expected = attend(case, window=40)
    case.leave_window(40)
    assert torch.equal(attend(case, window=40), expected)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (9, 1)], ids=str)
def test_head_shapes_and_block_sizes(attention_case, heads, kv_heads, head_dim, block_size):
    case = attention_case(
        *MIXED, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size
    )
    assert_is_defined_attention(case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 16])
def test_soft_cap(attention_case, window, dtype):
    assert_is_defined_attention(attention_case(*MIXED, dtype=dtype), window, softcap=2.0)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    decodes=st.lists(st.integers(1, 200), max_size=6),
    prefills=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 90)), max_size=3),
    window=st.none() | st.integers(1, 120),
    seed=st.integers(0, 1000),
)
def test_any_batch(attention_case, decodes, prefills, window, seed):
    contexts = decodes + [cached + new for new, cached in prefills]
    queries = [1] * len(decodes) + [new for new, _ in prefills]
    case = attention_case(contexts, queries, seed=seed, head_dim=16)
    assert_is_defined_attention(case, window)


def test_a_quantized_cache_is_refused(attention_case):
    case = attention_case([20], cache_dtype=torch.float8_e4m3fn)
    prepared = prepare_attention_cpu(case.batch, case.block_size)
    with pytest.raises(ValueError, match=r"k_cache.*float8_e4m3fn"):
        paged_attention_cpu(case.q, case.k_cache, case.v_cache, prepared, scale=SCALE)


def test_empty_batch(attention_case):
    assert attend(attention_case([])).shape == (0, 6, 64)


def test_a_strided_query_is_read_as_it_lies(attention_case):
    case = attention_case(*MIXED)
    wider = torch.full((case.q.shape[0], 9, 64), float("nan"))
    wider[:, :6] = case.q
    expected = attend(case)
    case.q = wider[:, :6]
    torch.testing.assert_close(attend(case), expected, rtol=0, atol=0)


def test_a_decode_has_the_same_bits_alone_and_among_others(attention_case):
    contexts = [33, 300, 7, 128, 129, 300, 64]
    case = attention_case(contexts)
    together = attend(case)
    for i_row in range(len(contexts)):
        alone = replace(
            case.batch,
            slots=case.batch.slots[i_row : i_row + 1],
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=case.batch.context_lens[i_row : i_row + 1],
            num_decodes=1,
        )
        prepared = prepare_attention_cpu(alone, case.block_size)
        q = case.q[i_row : i_row + 1]
        out = paged_attention_cpu(q, case.k_cache, case.v_cache, prepared, scale=SCALE)
        assert torch.equal(out[0], together[i_row])


def test_a_prompt_in_chunks_is_the_prompt_at_once(attention_case):
    whole = attention_case([150], [150])
    expected = attend(whole)
    for begin, end in ((0, 64), (64, 65), (65, 128), (128, 150)):
        chunk = replace(
            whole.batch,
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            num_decodes=0,
        )
        prepared = prepare_attention_cpu(chunk, whole.block_size)
        q = whole.q[begin:end]
        out = paged_attention_cpu(q, whole.k_cache, whole.v_cache, prepared, scale=SCALE)
        torch.testing.assert_close(out, expected[begin:end], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_of_nans_harms_no_other_row_and_no_later_layer(attention_case, dtype):
    case = attention_case([40, 40, 70], dtype=dtype)
    prepared = prepare_attention_cpu(case.batch, case.block_size)
    caches = (case.k_cache, case.v_cache)
    expected = paged_attention_cpu(case.q, *caches, prepared, scale=SCALE)
    poisoned = case.q.clone()
    poisoned[0] = float("nan")
    out = paged_attention_cpu(poisoned, *caches, prepared, scale=SCALE)
    assert out[0].isnan().all() and torch.equal(out[1:], expected[1:])
    assert torch.equal(paged_attention_cpu(case.q, *caches, prepared, scale=SCALE), expected)


def test_large_groups_are_split_to_bound_their_memory(attention_case, monkeypatch):
    case = attention_case([60] * 5)
    expected = attend(case)
    monkeypatch.setattr("millrace.kernels.attention_cpu.MAX_GROUP_SCORES", 2 * 6 * 64)
    prepared = prepare_attention_cpu(case.batch, case.block_size)
    groups = prepared.decode_groups(6, case.k_cache.shape)
    assert [group.shape for group in groups] == [(2, 6, 64), (2, 6, 64), (1, 6, 64)]
    assert torch.equal(attend(case), expected)


def test_padded_lengths_cover_with_at_most_a_quarter_to_spare():
    assert [padded_length(n) for n in (1, 16, 17, 64, 65, 128, 129, 300)] == [
        16, 16, 32, 64, 80, 128, 160, 320,
    ]  # fmt: skip
    for n in range(1, 5000):
        assert n <= padded_length(n) <= max(n + 15, 1.25 * n)
        assert padded_length(padded_length(n)) == padded_length(n)
    assert padded_length(MAX_GROUP_SCORES) == MAX_GROUP_SCORES


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"context_lens": torch.tensor([0, 5], dtype=torch.int32)}, "context_lens.0."),
        ({"context_lens": torch.tensor([5, 2], dtype=torch.int32)}, "context_lens.1."),
        ({"context_lens": torch.tensor([34, 5], dtype=torch.int32)}, "context_lens.0."),
        ({"query_start": torch.tensor([0, 2, 4], dtype=torch.int32)}, "query_start"),
        ({"query_start": torch.tensor([0, 1, 1], dtype=torch.int32)}, "context_lens.1."),
    ],
    ids=["no context", "shorter than queries", "above max", "decode of two", "no query"],
)
def test_values_that_contradict_each_other_are_named(attention_case, change, name):
    case = attention_case([33, 5], [1, 3])
    with pytest.raises(ValueError, match=name):
        prepare_attention_cpu(replace(case.batch, **change), case.block_size)


def test_a_context_that_fills_the_whole_cache_of_one_kv_head(attention_case):
    """Its padded length, 320, is more than the 272 rows that the cache has."""
    blocks, block_size, heads, head_dim = 17, 16, 2, 64
    random = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(shape, generator=random)
        for shape in (
            (1, heads, head_dim),
            (blocks, block_size, 1, head_dim),
            (blocks, block_size, 1, head_dim),
        )
    )
    batch = AttentionBatch(
        block_table=torch.randperm(blocks, generator=random).to(torch.int32).unsqueeze(0),
        slots=torch.zeros(1, dtype=torch.int64),
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        context_lens=torch.tensor([blocks * block_size], dtype=torch.int32),
        max_query_len=1,
        max_context_len=blocks * block_size,
        num_decodes=1,
    )
    assert padded_length(blocks * block_size) > blocks * block_size
    case = attention_case([1])
    assert_is_defined_attention(replace(case, q=q, k_cache=keys, v_cache=values, batch=batch))
