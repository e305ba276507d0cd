"""kv_append and the attention of decodes in one launch, compiled: the bits of the two apart."""

import pytest
import torch

from millrace.kernels.append_attention_triton import append_attention
from millrace.kernels.attention import AttentionBatch, prepare_attention
from millrace.kernels.attention_triton import paged_attention
from millrace.kernels.kv_append_triton import kv_append
from millrace.kernels.rope import rope_table

SCALE, EPS, BLOCK_SIZE = 0.125, 1e-6, 16
CONTEXTS = (1, 16, 17, 256, 257, 700, 1000)


def arguments(heads, kv_heads, head_dim, dtype, norm):
    """Of append_attention; rows of the sequence's block table one after the other."""
    random = torch.Generator("cuda").manual_seed(head_dim)

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda").to(dtype)

    rows, width = len(CONTEXTS), -(-max(CONTEXTS) // BLOCK_SIZE)
    table = torch.randperm(rows * width, generator=random, device="cuda").view(rows, width)
    lengths = torch.tensor(CONTEXTS, device="cuda")
    positions = lengths - 1
    blocks = table.gather(1, positions[:, None] // BLOCK_SIZE)[:, 0]
    batch = AttentionBatch(
        block_table=table.int(),
        slots=torch.arange(rows, device="cuda"),
        query_start=torch.arange(rows + 1, dtype=torch.int32, device="cuda"),
        context_lens=lengths.int(),
        max_query_len=1,
        max_context_len=max(CONTEXTS),
        num_decodes=rows,
    )
    caches = [normal(rows * width, BLOCK_SIZE, kv_heads, head_dim) for _ in range(2)]
    norms = [normal(head_dim) if norm else None for _ in range(2)]
    return (
        normal(rows, (heads + 2 * kv_heads) * head_dim),
        *(positions, blocks * BLOCK_SIZE + positions % BLOCK_SIZE),
        rope_table(head_dim, max(CONTEXTS), 10000.0, device="cuda"),
        *(*caches, heads, *norms, EPS, prepare_attention(batch, BLOCK_SIZE)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (8, 2, 80)])
def test_the_bits_are_those_of_two_launches(heads, kv_heads, head_dim, norm, dtype):
    together = arguments(heads, kv_heads, head_dim, dtype, norm)
    copies = [cache.clone() for cache in together[4:6]]
    *appended, prepared = (*together[:4], *copies, *together[6:])
    q = kv_append(*appended)
    expected = paged_attention(q, *copies, prepared, scale=SCALE)
    for _ in range(20):  # a program that read too early would not do so each time
        assert torch.equal(append_attention(*together, scale=SCALE), expected)
    for cache, other in zip(together[4:6], copies, strict=True):
        assert torch.equal(cache, other)
