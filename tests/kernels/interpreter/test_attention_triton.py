"""Triton's paged attention against the definition, and the promises about its bits.

Every cache entry outside a context is a NaN, and so is all memory that the launcher allocates.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from millrace.kernels import attention_triton
from millrace.kernels.attention import paged_attention_reference, prepare_attention
from millrace.kernels.attention_triton import MERGE_UNROLL, SPLIT, most_parts, paged_attention

SCALE = 0.125
# float32 sums in another order; 16-bit rounds weights and result, bf16 by truncation here.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FP8 = torch.float8_e4m3fn
MIXED = ([33, 1, SPLIT + 1, 40, 7], [1, 1, 1, 40, 3])


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def attend(case, window=None, softcap=None, form=paged_attention):
    prepared = prepare_attention(case.batch, case.block_size, window)
    return form(
        case.q,
        case.k_cache,
        case.v_cache,
        prepared,
        scale=SCALE,
        softcap=softcap,
        kv_scales=case.kv_scales,
    )


def assert_is_defined_attention(case, window=None, softcap=None):
    expected = attend(case, window, softcap, paged_attention_reference)
    tolerance = TOLERANCE[case.q.dtype]
    actual = attend(case, window, softcap)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decodes_at_the_edges_of_blocks_tiles_and_splits(attention_case, dtype):
    contexts = [1, 15, 16, 17, 31, 33, 65, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 1]
    assert_is_defined_attention(attention_case(contexts, heads=3, kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_prefills_at_the_edges_of_blocks_tiles_and_splits(attention_case, dtype):
    """One token, a chunk after a prefix, and one that ends just behind a split."""
    case = attention_case(
        [1, 63, 65, SPLIT, SPLIT + 1],
        [1, 63, 17, 16, 3],
        heads=3,
        kv_heads=1,
        dtype=dtype,
        num_decodes=0,
    )
    assert_is_defined_attention(case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(40, None), (None, 2.0), (1, 2.0)])
def test_windows_and_soft_caps_in_a_mixed_batch(attention_case, window, softcap, dtype):
    case = attention_case(*MIXED, heads=3, kv_heads=1, dtype=dtype)
    assert_is_defined_attention(case, window, softcap)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [
        (4, 4, 64, 16),
        (6, 2, 80, 16),
        (2, 1, 96, 48),
        (8, 2, 128, 32),
        (2, 1, 256, 128),
        (18, 1, 64, 64),
        (1, 1, 8, 16),
    ],
    ids=str,
)
def test_head_shapes_and_block_sizes(attention_case, heads, kv_heads, head_dim, block_size):
    case = attention_case(
        [65, 150, 33],
        [1, 1, 20],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=torch.float16,
    )
    assert_is_defined_attention(case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_quantized_cache(attention_case, dtype, softcap):
    case = attention_case(*MIXED, heads=4, head_dim=16, dtype=dtype, cache_dtype=FP8)
    assert_is_defined_attention(case, softcap=softcap)


def test_a_quantized_cache_without_scales(attention_case):
    case = attention_case([33, 20], [1, 20], dtype=torch.float16, cache_dtype=FP8)
    case.kv_scales = None
    assert_is_defined_attention(case)


@pytest.mark.parametrize("window", [SPLIT - 1, SPLIT, SPLIT + 1, SPLIT + 34])
def test_windows_that_begin_inside_a_split_and_at_its_edges(attention_case, window):
    case = attention_case(
        [300, 2 * SPLIT, 600, 300],
        [1, 1, 1, 5],
        heads=1,
        kv_heads=1,
        dtype=torch.float16,
    )
    assert_is_defined_attention(case, window=window)


def test_blocks_that_left_the_window_are_not_read(attention_case):
    """The scheduler frees them: another sequence may have written anything there."""
    case = attention_case([150, 150], [1, 20], heads=2, kv_heads=1, dtype=torch.float16)
    expected = attend(case, window=40)
    case.leave_window(40)
    assert torch.equal(attend(case, window=40), expected)


def test_a_huge_row_among_small_ones(attention_case):
    contexts, queries = [1, 1300, 2, 3, 700, 4, 65], [1, 1, 1, 3, 2, 4, 65]
    case = attention_case(contexts, queries, heads=2, kv_heads=1, dtype=torch.float16)
    assert_is_defined_attention(case)


def test_rows_without_queries_and_rows_without_context(attention_case):
    contexts, queries = [33, 0, 0, 20, 0, 5], [1, 1, 0, 20, 0, 2]
    case = attention_case(contexts, queries, num_decodes=2, dtype=torch.float16)
    assert_is_defined_attention(case)
    assert (attend(case)[1] == 0).all()


def test_batches_of_one_kind_and_of_no_rows(attention_case):
    assert_is_defined_attention(attention_case([20], [20]))
    assert_is_defined_attention(attention_case([20], [1]))
    assert attend(attention_case([])).shape == (0, 6, 64)


def test_any_valid_upper_bound_of_lengths_gives_the_same_bits(attention_case):
    """A graph is launched with the largest context that it may meet."""
    case = attention_case(*MIXED, heads=2, kv_heads=1, dtype=torch.float16)
    expected = attend(case)
    wide = torch.full((case.batch.block_table.shape[0], 64), -1, dtype=torch.int32)
    wide[:, : case.batch.block_table.shape[1]] = case.batch.block_table
    case.batch = replace(case.batch, block_table=wide, max_context_len=1024, max_query_len=512)
    assert torch.equal(attend(case), expected)


# ---------------------------------------------------------------- scratch


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_rows_whose_splits_find_no_room_have_the_same_bits(attention_case, monkeypatch, capacity):
    """Of 2, 1, 2 and 3 splits: the first rows fit, and one program does each of the others."""
    shape = {"heads": 1, "kv_heads": 1, "head_dim": 16, "dtype": torch.float16}
    case = attention_case([300, 40, 2 * SPLIT, 600], block_size=64, **shape)
    expected = attend(case)
    monkeypatch.setattr(attention_triton, "most_parts", lambda *of: capacity)
    assert torch.equal(attend(case), expected)


@pytest.mark.parametrize("window", [None, 300])
def test_rows_that_share_blocks_are_right_where_scratch_is_for_the_cache(attention_case, window):
    """Four rows of one sequence: more splits than the tokens of the cache make."""
    case = attention_case([3 * SPLIT + 8], heads=1, kv_heads=1, head_dim=16, block_size=128)
    rows = 4
    batch = replace(
        case.batch,
        slots=case.batch.slots.expand(rows).contiguous(),
        query_start=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=case.batch.context_lens - torch.arange(rows, dtype=torch.int32),
        num_decodes=rows,
    )
    case = replace(case, batch=batch, q=case.q.expand(rows, -1, -1).contiguous())
    cache_tokens = case.k_cache[:, :, 0, 0].numel()
    assert window or most_parts(rows, 3 * SPLIT + 8, 0, cache_tokens) < rows * 4
    assert_is_defined_attention(case, window)


def test_scratch_holds_whatever_rows_of_their_own_blocks_need():
    """The bound does not grow with the longest context, and no batch without sharing exceeds it."""
    draw = random.Random(0)
    for _ in range(300):
        contexts = [draw.choice([1, 300, 4096]) + draw.randrange(600) for _ in range(20)]
        cache_tokens = sum(contexts) + draw.randrange(100)
        splits = [-(-context // SPLIT) for context in contexts]
        needed = sum(count for count in splits if count > 1)
        assert needed <= most_parts(len(contexts), max(contexts), 0, cache_tokens)
    assert most_parts(256, 131_072, 0, 900_000) == 900_000 // SPLIT + 256
    assert most_parts(2, 1024, 0, 1 << 30) == 8
    assert most_parts(64, SPLIT, 0, 1 << 30) == 0, "a row of one split has no use for it"
    assert most_parts(64, 1 << 20, 40, 1 << 30) == 2 * 64, "a window lies in two splits at most"


# ---------------------------------------------------------------- bits


@pytest.fixture
def ordered_matmul(monkeypatch):
    """The interpreter multiplies with NumPy, whose BLAS sums a row in an order that depends on
    where in the matrix it stands. Matrix units do not do that, and neither does this."""

    def matmul(a, b, dtype):
        a, b = a.astype(dtype), b.astype(dtype)
        return np.add.reduce(a[:, :, None] * b[None], axis=1)  # over a middle axis: in order

    monkeypatch.setattr(np, "matmul", matmul)


def rows(case, start, stop, num_decodes):
    """The batch of rows start .. stop - 1 alone."""
    batch = case.batch
    offsets = batch.query_start[start : stop + 1]
    part = replace(
        batch,
        slots=batch.slots[start:stop],
        query_start=offsets - offsets[0],
        context_lens=batch.context_lens[start:stop],
        max_context_len=int(batch.context_lens[start:stop].max()),
        num_decodes=num_decodes,
    )
    return replace(case, batch=part, q=case.q[int(offsets[0]) : int(offsets[-1])])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(attention_case, dtype):
    """Alone, row 0 needs one split and no merge; beside row 1 the launch has two."""
    contexts, queries = [100, 300, 270, 40], [1, 1, 20, 3]
    case = attention_case(contexts, queries, heads=2, kv_heads=1, dtype=dtype)
    together = attend(case)
    starts = case.batch.query_start.tolist()
    for i_row in range(4):
        alone = attend(rows(case, i_row, i_row + 1, int(i_row < 2)))
        assert torch.equal(alone, together[starts[i_row] : starts[i_row + 1]])


def chunk(case, start, stop, num_decodes=0):
    """Queries start .. stop - 1 of a case that prefills one row at once."""
    batch = replace(
        case.batch,
        query_start=torch.tensor([0, stop - start], dtype=torch.int32),
        context_lens=torch.tensor([stop], dtype=torch.int32),
        max_query_len=stop - start,
        max_context_len=stop,
        num_decodes=num_decodes,
    )
    return replace(case, batch=batch, q=case.q[start:stop])


@pytest.fixture
def prompt(attention_case, ordered_matmul):
    """A prompt that ends behind a split."""

    def make(dtype=torch.float16, context=SPLIT + 5, **options):
        shape = {"heads": 2, "kv_heads": 1, "head_dim": 16}
        return attention_case([context], [context], dtype=dtype, **shape, **options)

    return make


@pytest.mark.parametrize("size", [7, 16, 64])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, 2.0)])
def test_a_prompt_has_the_same_bits_in_chunks_as_whole(prompt, size, window, softcap):
    """Every later chunk has a warm prefix: the cache holds what came before it."""
    case = prompt()
    whole = attend(case, window, softcap)
    # Where tiles and splits end, and a stretch between; all chunks would take a minute.
    for start in (0, 3 * size, SPLIT - size + 1, SPLIT + 5 - size):
        stop = start + size
        assert torch.equal(attend(chunk(case, start, stop), window, softcap), whole[start:stop])


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [(torch.float16, None, None), (torch.bfloat16, 50, 2.0), (torch.float32, None, None)],
    ids=str,
)
def test_a_position_has_the_same_bits_decoded_as_prefilled(prompt, dtype, window, softcap):
    case = prompt(dtype)
    whole = attend(case, window, softcap)
    for position in (0, 31, 32, 100, SPLIT + 4):
        for num_decodes in (0, 1):
            one = chunk(case, position, position + 1, num_decodes)
            assert torch.equal(attend(one, window, softcap)[0], whole[position])


@pytest.mark.parametrize(
    ("head_dim", "block_size", "cache_dtype"),
    [(64, 16, None), (80, 32, FP8), (96, 48, None), (128, 64, FP8), (256, 128, None)],
    ids=str,
)
def test_head_dimensions_and_blocks_keep_the_bits_around_a_split(
    attention_case, ordered_matmul, head_dim, block_size, cache_dtype
):
    """The last position of a split and the first two of the next, in three kinds of launches."""
    shape = {"head_dim": head_dim, "block_size": block_size, "cache_dtype": cache_dtype}
    context, start = SPLIT + 2, SPLIT - 3
    case = attention_case([context], [context], heads=1, kv_heads=1, dtype=torch.float16, **shape)
    chunked = attend(chunk(case, start, context))
    for position in (SPLIT - 1, SPLIT, SPLIT + 1):
        for num_decodes in (0, 1):
            one = attend(chunk(case, position, position + 1, num_decodes))
            assert torch.equal(one[0], chunked[position - start])


def test_many_splits_have_the_same_bits_merged_as_folded(prompt):
    """More splits than the merge reads at once, maxima that rise and fall, an almost empty one."""
    case = prompt(context=(MERGE_UNROLL + 2) * SPLIT + 1, block_size=128)
    case.q = case.q * 8
    last = len(case.q) - 1
    decoded = attend(chunk(case, last, last + 1, num_decodes=1))
    assert torch.equal(decoded, attend(chunk(case, last, last + 1)))


def test_a_nan_in_one_query_harms_no_other(attention_case):
    case = attention_case(*MIXED, heads=2, kv_heads=1, dtype=torch.float16)
    expected = attend(case)
    poisoned = case.q.clone()
    tokens = [0, 2, 10]
    poisoned[tokens, 1] = float("nan")
    out = attend(replace(case, q=poisoned))
    assert out[tokens, 1].isnan().all()
    out[tokens, 1] = expected[tokens, 1]
    assert torch.equal(out, expected)


# ---------------------------------------------------------------- arguments


def test_a_strided_query_is_read_as_it_lies(attention_case):
    case = attention_case([65, 33, 20], [1, 1, 20], dtype=torch.float16)
    wide = torch.full((22, 9, 64), float("nan"), dtype=torch.float16)
    wide[:, :6] = case.q
    assert torch.equal(attend(replace(case, q=wide[:, :6])), attend(case))


def test_a_query_strided_in_its_last_dimension_is_refused(attention_case):
    case = attention_case([65])
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="q: expected a last stride of 1"):
        attend(replace(case, q=transposed))


def test_a_head_dimension_that_no_tile_holds_is_refused(attention_case):
    with pytest.raises(ValueError, match="q: expected a head dimension up to 256"):
        attend(attention_case([5], head_dim=288))
