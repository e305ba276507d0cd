"""Paged batches for the attention benchmark: sequences whose blocks are scattered over the cache.

Blocks lie together in groups of 64 tokens and the groups are scattered, since a page of xformers'
kernel holds no fewer: so it can walk the very same cache with a table of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.attention import AttentionBatch, KVScales

GROUP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Heads, their size and the dtype of a model's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    fp8_cache: bool = False
    window: int | None = None
    softcap: float | None = None

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8_cache else self.dtype

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class PagedInputs:
    layout: Layout
    contexts: tuple[int, ...]  # tokens in the cache, by row
    queries: tuple[int, ...]  # the last so many of them are asked for, by row
    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [B, P, G, D]
    v_cache: Tensor
    batch: AttentionBatch
    kv_scales: KVScales | None  # of an fp8 cache
    groups: Tensor  # i32 [R, most groups of a row], in units of GROUP_TOKENS cache rows


def paged_inputs(
    layout: Layout,
    contexts: Sequence[int],
    queries: Sequence[int],
    device: torch.device,
    seed: int,
) -> PagedInputs:
    """Random queries, keys and values; cache rows that no sequence owns are NaN."""
    random = torch.Generator(device).manual_seed(seed)
    groups = _scattered_groups(contexts, seed)
    per_group = GROUP_TOKENS // layout.block_size
    blocks = (groups.unsqueeze(2) * per_group + torch.arange(per_group)).flatten(1)
    shape = (int(groups.max() + 1) * per_group, layout.block_size, layout.kv_heads, layout.head_dim)
    k_cache, v_cache = (
        torch.empty(shape, dtype=layout.dtype, device=device)
        .normal_(generator=random)
        .to(layout.cache_dtype)
        for _ in range(2)
    )
    for i_row, context in enumerate(contexts):
        owned = -(-context // GROUP_TOKENS)
        unused = GROUP_TOKENS * int(groups[i_row, owned - 1] + 1), owned * GROUP_TOKENS - context
        for cache in (k_cache, v_cache):
            cache.flatten(0, 1)[unused[0] - unused[1] : unused[0]] = torch.nan
    q = torch.empty(sum(queries), layout.heads, layout.head_dim, dtype=layout.dtype, device=device)
    batch = AttentionBatch(
        block_table=blocks.int().to(device),
        slots=torch.arange(len(contexts), device=device),
        query_start=torch.tensor([0, *queries]).cumsum(0).int().to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        max_query_len=max(queries),
        max_context_len=max(contexts),
        num_decodes=next((i for i, n in enumerate(queries) if n != 1), len(queries)),
    )
    return PagedInputs(
        layout,
        tuple(contexts),
        tuple(queries),
        q.normal_(generator=random),
        k_cache,
        v_cache,
        batch,
        kv_scales(layout.kv_heads, device) if layout.fp8_cache else None,
        groups.int().to(device),
    )


def _scattered_groups(contexts: Sequence[int], seed: int) -> Tensor:
    """i64 [R, most groups]: which groups each row owns; 0 where it has no more."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-context // GROUP_TOKENS) for context in contexts]
    order = torch.randperm(sum(counts), generator=random)
    table = torch.zeros(len(contexts), max(counts), dtype=torch.int64)
    for i_row, owned in enumerate(order.split(counts)):
        table[i_row, : len(owned)] = owned
    return table


def kv_bytes(layout: Layout, contexts: Sequence[int]) -> int:
    """Keys and values of these contexts."""
    return 2 * sum(contexts) * layout.kv_heads * layout.head_dim * layout.cache_dtype.itemsize


def kv_scales(kv_heads: int, device: torch.device) -> KVScales:
    """Of each head another: a kernel that takes the wrong one fails its check."""
    key = torch.linspace(0.5, 1.5, kv_heads, device=device)
    return KVScales(key=key, value=2 - key)
