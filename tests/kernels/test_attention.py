"""The definition of paged attention, and the batch, against dense attention in float64."""

from dataclasses import replace

import pytest
import torch

from millrace.kernels.attention import (
    KVScales,
    paged_attention_reference,
    prepare_attention,
    visible_positions,
)

SCALE = 0.125


def dense_attention(case, window=None, softcap=None):
    """One query and one head at a time in float64, from the dense keys and values: [T, H, D]."""
    group = case.q.shape[1] // case.k_cache.shape[2]
    starts = case.batch.query_start.tolist()
    out = torch.empty(case.q.shape, dtype=torch.float64)
    for i_row, (keys, values) in enumerate(case.dense):
        context, num_queries = len(keys), starts[i_row + 1] - starts[i_row]
        for j in range(num_queries):
            position = context - num_queries + j
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            for head in range(case.q.shape[1]):
                k, v = (x[seen, head // group].double() for x in (keys, values))
                if case.kv_scales is not None:
                    k = k * case.kv_scales.key[head // group].double()
                    v = v * case.kv_scales.value[head // group].double()
                scores = SCALE * (k @ case.q[starts[i_row] + j, head].double())
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[starts[i_row] + j, head] = scores.softmax(0) @ v
    return out


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_definition_is_dense_causal_attention(attention_case, window, softcap):
    case = attention_case([33, 1, 16, 40, 5], [1, 1, 1, 9, 5])
    prepared = prepare_attention(case.batch, case.block_size, window)
    actual = paged_attention_reference(
        case.q, case.k_cache, case.v_cache, prepared, scale=SCALE, softcap=softcap
    )
    expected = dense_attention(case, window, softcap)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_blocks_that_left_the_window_are_not_read(attention_case):
    """The scheduler frees them: another sequence may have written anything there, even NaN."""
    case = attention_case([150, 150], [1, 20])
    prepared = prepare_attention(case.batch, case.block_size, 40)
    caches = (case.k_cache, case.v_cache)
    expected = paged_attention_reference(case.q, *caches, prepared, scale=SCALE)
    case.leave_window(40)
    assert torch.equal(paged_attention_reference(case.q, *caches, prepared, scale=SCALE), expected)


def test_a_quantized_cache_stands_for_its_numbers_times_the_scale_of_their_head(attention_case):
    case = attention_case([33, 1, 40], [1, 1, 9], cache_dtype=torch.float8_e4m3fn)
    prepared = prepare_attention(case.batch, case.block_size)
    caches = (case.k_cache, case.v_cache)
    out = paged_attention_reference(
        case.q, *caches, prepared, scale=SCALE, kv_scales=case.kv_scales
    )
    torch.testing.assert_close(out.double(), dense_attention(case), rtol=1e-5, atol=1e-6)
    unscaled = paged_attention_reference(case.q, *caches, prepared, scale=SCALE)
    case.kv_scales = None
    torch.testing.assert_close(unscaled.double(), dense_attention(case), rtol=1e-5, atol=1e-6)


def test_a_row_without_context_gives_zeros(attention_case):
    """Rows that pad a batch to the size of a graph."""
    case = attention_case([33, 0, 5])
    prepared = prepare_attention(case.batch, case.block_size)
    out = paged_attention_reference(case.q, case.k_cache, case.v_cache, prepared, scale=SCALE)
    assert (out[1] == 0).all() and not out.isnan().any()


def test_the_comparison_notices_one_wrong_block(attention_case):
    case = attention_case([40])
    slot = case.batch.slots[0]
    table = case.batch.block_table.clone()
    table[slot, :2] = table[slot, :2].flip(0)
    case.v_cache.nan_to_num_(), case.k_cache.nan_to_num_()
    prepared = prepare_attention(replace(case.batch, block_table=table), case.block_size)
    out = paged_attention_reference(case.q, case.k_cache, case.v_cache, prepared, scale=SCALE)
    # Full blocks in another order are the same set of tokens: still right. One block twice is not.
    torch.testing.assert_close(out.double(), dense_attention(case), rtol=1e-5, atol=1e-6)
    table[slot, 0] = table[slot, 1]
    out = paged_attention_reference(case.q, case.k_cache, case.v_cache, prepared, scale=SCALE)
    assert (out.double() - dense_attention(case)).abs().max() > 1e-2


def test_queries_end_at_the_end_of_their_context():
    """The docstring's row 1: 3 queries in a context of 7 are at positions 4, 5, 6."""
    visible = visible_positions(3, 7, None, torch.device("cpu"))
    assert visible.sum(1).tolist() == [5, 6, 7]
    assert visible_positions(3, 7, 2, torch.device("cpu")).long().tolist() == [
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("block_table", torch.zeros(4, 3, dtype=torch.int64)),
        ("block_table", torch.zeros(3, 4, dtype=torch.int32).t()),
        ("slots", torch.zeros(2, dtype=torch.int32)),
        ("query_start", torch.zeros(2, dtype=torch.int32)),
        ("context_lens", torch.zeros(3, dtype=torch.int32)),
        ("num_decodes", 3),
        ("num_decodes", -1),
        ("max_context_len", 10_000),
    ],
    ids=str,
)
def test_a_field_of_the_batch_that_does_not_fit_is_named(attention_case, field, bad):
    case = attention_case([33, 5])
    with pytest.raises(ValueError, match=field):
        prepare_attention(replace(case.batch, **{field: bad}), case.block_size)


@pytest.mark.parametrize(("block_size", "window"), [(0, None), (16, 0), (16, -1)])
def test_block_size_and_window_must_be_positive(attention_case, block_size, window):
    with pytest.raises(ValueError, match="window" if block_size else "block_size"):
        prepare_attention(attention_case([5]).batch, block_size, window)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda case: {"q": case.q[:, :5]}),  # 5 heads for 2 KV heads
        ("q", lambda case: {"q": case.q.half()}),
        ("v_cache", lambda case: {"v_cache": case.v_cache[:-1]}),
        ("k_cache", lambda case: {"k_cache": case.k_cache[:, :8]}),
        ("softcap", lambda case: {"softcap": 0.0}),
        ("scale", lambda case: {"scale": 0.0}),
        ("kv_scales.key", lambda case: {"kv_scales": KVScales(torch.ones(6), torch.ones(2))}),
        ("kv_scales.value", lambda case: {"kv_scales": KVScales(torch.ones(2), torch.ones(1))}),
    ],
    ids=[
        "heads",
        "dtype",
        "blocks",
        "block_size",
        "softcap",
        "scale",
        "key scales",
        "value scales",
    ],
)
def test_an_argument_that_does_not_fit_is_named(attention_case, name, change):
    case = attention_case([33])
    arguments = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "scale": SCALE}
    prepared = prepare_attention(case.batch, case.block_size)
    with pytest.raises(ValueError, match=name):
        paged_attention_reference(**{**arguments, **change(case)}, prepared=prepared)
