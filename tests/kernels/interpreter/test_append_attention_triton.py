"""kv_append and the attention of decodes in one launch: the bits of the two launches apart."""

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels.append_attention import append_attention_reference
from millrace.kernels.append_attention_triton import append_attention
from millrace.kernels.attention import prepare_attention
from millrace.kernels.attention_triton import paged_attention
from millrace.kernels.kv_append_triton import kv_append

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SCALE = 0.125


def caches_of(arguments):
    return arguments[4:6]


def with_copied_caches(arguments):
    copies = [cache.clone() for cache in caches_of(arguments)]
    return (*arguments[:4], *copies, *arguments[6:])


def apart(arguments):
    *appended, prepared = arguments
    q = kv_append(*appended)
    return paged_attention(q, *caches_of(arguments), prepared, scale=SCALE)


@pytest.mark.parametrize(
    ("contexts", "options"),
    [
        ([1, 257, 17], {"heads": 4, "kv_heads": 2, "head_dim": 16}),  # one split, and two
        ([256], {"norm": True, "heads": 3, "kv_heads": 1, "head_dim": 20}),
        ([260, 40], {"window": 9, "heads": 5, "kv_heads": 1, "head_dim": 80}),
        ([3, 40], {"norm": True, "dtype": torch.float16, "heads": 3, "kv_heads": 3}),
        ([2, 33], {"dtype": torch.bfloat16, "block_size": 32}),
    ],
    ids=str,
)
def test_the_bits_are_those_of_two_launches(decode_case, contexts, options):
    together = decode_case(contexts, **options)
    separate = with_copied_caches(together)
    assert torch.equal(append_attention(*together, scale=SCALE), apart(separate))
    for cache, other in zip(caches_of(together), caches_of(separate), strict=True):
        torch.testing.assert_close(cache, other, rtol=0, atol=0, equal_nan=True)


def test_it_agrees_with_the_definition(decode_case):
    together = decode_case([1, 16, 33], norm=True)
    defined = with_copied_caches(together)
    out = append_attention(*together, scale=SCALE)
    expected = append_attention_reference(*defined, scale=SCALE)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_alone(decode_case):
    together = decode_case([40, 5])
    qkv, positions, write_index, *rest, prepared = with_copied_caches(together)
    batch = prepared.batch
    alone = prepare_attention(
        type(batch)(
            *(batch.block_table, batch.slots[:1], batch.query_start[:2], batch.context_lens[:1]),
            *(1, 40, 1),
        ),
        prepared.block_size,
    )
    first = (qkv[:1], positions[:1], write_index[:1], *rest, alone)
    expected = append_attention(*together, scale=SCALE)[:1]
    assert torch.equal(append_attention(*first, scale=SCALE), expected)


def test_padding_writes_no_row_and_no_rows_are_no_work(decode_case):
    arguments = decode_case([5])
    before = [cache.clone() for cache in caches_of(arguments)]
    padded = (*arguments[:2], torch.tensor([-1]), *arguments[3:])
    append_attention(*padded, scale=SCALE)
    for cache, same in zip(caches_of(arguments), before, strict=True):
        torch.testing.assert_close(cache, same, rtol=0, atol=0, equal_nan=True)
    assert append_attention(*decode_case([]), scale=SCALE).shape[0] == 0


def test_a_batch_with_other_rows_than_tokens_is_refused(decode_case):
    arguments = decode_case([5, 6])
    one_row = decode_case([5])[-1]
    with pytest.raises(ValueError, match=r"^slots: expected \[2\]"):
        append_attention(*arguments[:-1], one_row, scale=SCALE)
