"""The Triton decode kernel against the definition; every unused cache entry is a NaN."""

from dataclasses import replace

import pytest
import torch

from millrace.kernels.attention import paged_attention_reference, prepare_attention
from millrace.kernels.attention_triton import SPLIT, paged_attention

SCALE = 0.125
# float32 sums in another order; 16-bit rounds weights and result, bf16 by truncation here.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def attend(case, window=None, softcap=None, form=paged_attention):
    prepared = prepare_attention(case.batch, case.block_size, window)
    return form(case.q, case.k_cache, case.v_cache, prepared, scale=SCALE, softcap=softcap)


def assert_is_defined_attention(case, window=None, softcap=None):
    expected = attend(case, window, softcap, paged_attention_reference)
    tolerance = TOLERANCE[case.q.dtype]
    actual = attend(case, window, softcap)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 2.0), (1, None)])
def test_one_split_and_several(attention_case, window, softcap, dtype):
    case = attention_case([1, 33, SPLIT, SPLIT + 1, 600], dtype=dtype)
    assert_is_defined_attention(case, window, softcap)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 4, 64, 16), (9, 3, 80, 16), (8, 2, 128, 32), (18, 1, 64, 16), (1, 1, 8, 16)],
    ids=str,
)
def test_head_shapes(attention_case, heads, kv_heads, head_dim, block_size):
    case = attention_case(
        [65, 300], heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size
    )
    assert_is_defined_attention(case)


def test_window_that_begins_inside_the_second_split(attention_case):
    assert_is_defined_attention(attention_case([300, 600]), window=290)


def test_prefill_rows_follow_the_decodes(attention_case):
    assert_is_defined_attention(attention_case([65, 20, 30], [1, 20, 7]))


def test_batches_without_decodes_and_without_rows(attention_case):
    assert_is_defined_attention(attention_case([20], [20]))
    assert attend(attention_case([])).shape == (0, 6, 64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(attention_case, dtype):
    """Alone, row 1 needs one split and no merge; beside row 0 the launch has three."""
    case = attention_case([600, 200, 300], dtype=dtype)
    together = attend(case)
    for i_row, context in ((1, 200), (2, 300)):
        batch = replace(
            case.batch,
            slots=case.batch.slots[i_row : i_row + 1],
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=case.batch.context_lens[i_row : i_row + 1],
            max_context_len=context,
            num_decodes=1,
        )
        alone = replace(case, batch=batch, q=case.q[i_row : i_row + 1])
        assert torch.equal(attend(alone)[0], together[i_row])


def test_a_strided_query_is_read_as_it_lies(attention_case):
    case = attention_case([65, 33])
    wide = torch.full((2, 9, 64), float("nan"))
    wide[:, :6] = case.q
    assert torch.equal(attend(replace(case, q=wide[:, :6])), attend(case))


def test_a_query_strided_in_its_last_dimension_is_refused(attention_case):
    case = attention_case([65])
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="q: expected a last stride of 1"):
        attend(replace(case, q=transposed))
