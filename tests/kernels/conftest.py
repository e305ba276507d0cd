"""A paged batch for the attention tests, with the dense keys and values that it pages."""

from dataclasses import dataclass

import pytest
import torch
from millrace.kernels.attention import AttentionBatch
from torch import Tensor

SPARE_SLOTS = 2
SPARE_BLOCKS = 3


@dataclass
class AttentionCase:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    dense: list[tuple[Tensor, Tensor]]  # by row: keys and values [context, G, D]
    block_size: int


@pytest.fixture
def attention_case():
    """make(contexts, queries, ...): sequences scattered over blocks, every unused byte a NaN."""

    def make(
        contexts,
        queries=None,
        *,
        heads=6,
        kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float32,
        seed=0,
    ):
        random = torch.Generator().manual_seed(seed)
        queries = queries or [1] * len(contexts)
        blocks_of_row = [-(-context // block_size) for context in contexts]
        num_blocks = sum(blocks_of_row) + SPARE_BLOCKS
        shape = (num_blocks, block_size, kv_heads, head_dim)
        k_cache = torch.full(shape, float("nan"), dtype=dtype)
        v_cache = torch.full(shape, float("nan"), dtype=dtype)
        slots = torch.randperm(len(contexts) + SPARE_SLOTS, generator=random)[: len(contexts)]
        table = torch.full((len(contexts) + SPARE_SLOTS, max([1, *blocks_of_row])), -1)
        free = torch.randperm(num_blocks, generator=random)
        dense = []
        for slot, context, needed in zip(slots, contexts, blocks_of_row, strict=True):
            blocks, free = free[:needed], free[needed:]
            table[slot, :needed] = blocks
            pair = torch.randn(2, context, kv_heads, head_dim, generator=random).to(dtype)
            for cache, tokens in zip((k_cache, v_cache), pair, strict=True):
                for position in range(context):
                    block = blocks[position // block_size]
                    cache[block, position % block_size] = tokens[position]
            dense.append((pair[0], pair[1]))
        num_decodes = next((i for i, n in enumerate(queries) if n != 1), len(queries))
        batch = AttentionBatch(
            block_table=table.int(),
            slots=slots,
            query_start=torch.tensor([0, *queries]).cumsum(0).int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            max_query_len=max([0, *queries]),
            max_context_len=max([0, *contexts]),
            num_decodes=num_decodes,
        )
        q = torch.randn(sum(queries), heads, head_dim, generator=random).to(dtype)
        return AttentionCase(q, k_cache, v_cache, batch, dense, block_size)

    return make
