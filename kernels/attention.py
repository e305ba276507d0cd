"""Paged attention (7 of 8): what it computes, and on which batch.

    out[t] = softmax(cap(scale * q[t] . K) + mask) . V          cap(s) = softcap * tanh(s / softcap)

over the cached tokens of the row that t belongs to; head h of H reads KV head h // (H / G) of G. A
query at position i sees positions j <= i and, with a window w, only j > i - w. Softmax and sums are
in float32 whatever the dtype of q. `cap` is the identity where softcap is None (Gemma 2 has one).
The cache has the dtype of q, or float8_e4m3fn; with `kv_scales`, what it stands for is the stored
number times a scale of its KV head.

This file holds the batch and the definition. `attention_cpu.py`, `attention_triton.py` and
`attention_xformers.py` are the fast forms; all share one calling form:

    prepared = prepare_attention(batch, block_size, window)                  once per step
    out = paged_attention(q, k_cache, v_cache, prepared, scale=, softcap=)   once per layer

so that what does not depend on the layer is worked out once. T tokens in the step, R rows
(sequences) in the step, S slots, B blocks in the pool, P tokens per block, H query heads, G KV
heads, D head dimension. Caches are [B, P, G, D].

Before it: engine/models/decoder.py, which calls it in each layer. After it: kernels/sampling.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.checks import FLOATING_DTYPES, expect, expect_contiguous

CACHE_DTYPES = (*FLOATING_DTYPES, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class KVScales:
    """What the stored values of an fp8 cache are multiplied by, for each KV head: f32 [G] each."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens of a step belong to which sequence, and where its cache lies.

    Rows with one query token each (decodes) come first, prefill chunks after them. Example, P = 16:
    slot 7 decodes position 33, and slot 2 prefills positions 4..6 after a chunk that held 0..3:

        query_start   [0, 1, 4]    row 0 owns q[0:1], row 1 owns q[1:4]
        context_lens  [34, 7]      tokens in the cache, those of this step included
        slots         [7, 2]
        block_table[7] = [5, 9, 4, ...]    position 33 is block 4 (= table[33 // 16]), offset 1
        block_table[2] = [8, ...]          positions 0..6 are block 8, offsets 0..6
        max_query_len 3, max_context_len 34, num_decodes 1

    Query j of a row with n queries and context c is at position c - n + j: row 1 has 7 - 3 + j.
    Entries of block_table beyond a row's context are never read, nor with a window those of blocks
    before it: another sequence may have written anything there, NaN included.
    """

    block_table: Tensor  # i32 [S, max_blocks]
    slots: Tensor  # i64 [R]
    query_start: Tensor  # i32 [R + 1]; query_start[0] = 0, query_start[R] = T
    context_lens: Tensor  # i32 [R], at least the row's number of queries
    max_query_len: int  # at least each row's number of queries
    max_context_len: int  # at least each of context_lens
    num_decodes: int  # the first num_decodes rows have one query token each


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """A batch with the facts of the layer's kind: the block size, and the window in tokens."""

    batch: AttentionBatch
    block_size: int
    window: int | None


def prepare_attention(
    batch: AttentionBatch, block_size: int, window: int | None = None
) -> PreparedAttention:
    """Check the batch's shapes and ranges; ValueError names the field that does not fit."""
    num_rows = batch.slots.shape[0]
    expect("block_table", batch.block_table, (None, None), torch.int32)
    expect_contiguous("block_table", batch.block_table)
    expect("slots", batch.slots, (num_rows,), torch.int64)
    expect("query_start", batch.query_start, (num_rows + 1,), torch.int32)
    expect("context_lens", batch.context_lens, (num_rows,), torch.int32)
    if not 0 <= batch.num_decodes <= num_rows:
        raise ValueError(f"num_decodes: expected 0 to {num_rows} rows, got {batch.num_decodes}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1 token, got {block_size}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected None or at least 1 token, got {window}")
    capacity = batch.block_table.shape[1] * block_size
    if batch.max_context_len > capacity:
        raise ValueError(
            f"max_context_len: expected at most {capacity} tokens "
            f"({batch.block_table.shape[1]} blocks of {block_size}), got {batch.max_context_len}"
        )
    return PreparedAttention(batch, block_size, window)


def expect_attention_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_size: int,
    scale: float,
    softcap: float | None,
    kv_scales: KVScales | None,
) -> None:
    """ValueError where q [T, H, D], the caches [B, P, G, D] and the rest do not fit together."""
    expect("k_cache", k_cache, (None, block_size, None, None), CACHE_DTYPES)
    expect("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype)
    expect_contiguous("k_cache", k_cache)
    expect_contiguous("v_cache", v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    quantized = k_cache.dtype == torch.float8_e4m3fn
    expect("q", q, (None, None, head_dim), FLOATING_DTYPES if quantized else k_cache.dtype)
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} KV heads, got {q.shape[1]}")
    if scale <= 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected None or a positive number, got {softcap}")
    if kv_scales is not None:
        expect("kv_scales.key", kv_scales.key, (num_kv_heads,), torch.float32)
        expect("kv_scales.value", kv_scales.value, (num_kv_heads,), torch.float32)
        expect_contiguous("kv_scales.key", kv_scales.key)
        expect_contiguous("kv_scales.value", kv_scales.value)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: PreparedAttention,
    *,
    scale: float,
    softcap: float | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """The definition, a row at a time: q [T, H, D] -> [T, H, D] of the dtype of q.

    `scale` multiplies q . k (usually D ** -0.5), `softcap` bounds the scaled scores. A row without
    context, which only pads a batch, gives 0.
    """
    expect_attention_inputs(q, k_cache, v_cache, prepared.block_size, scale, softcap, kv_scales)
    batch = prepared.batch
    out = torch.empty_like(q)
    starts = batch.query_start.tolist()
    for i_row, context in enumerate(batch.context_lens.tolist()):
        rows = slice(starts[i_row], starts[i_row + 1])
        first = first_position(rows.stop - rows.start, context, prepared)
        blocks = batch.block_table[batch.slots[i_row], first // prepared.block_size :]
        keys = gather_context(k_cache, blocks, context - first).float()
        values = gather_context(v_cache, blocks, context - first).float()
        if kv_scales is not None:
            keys, values = keys * kv_scales.key[:, None], values * kv_scales.value[:, None]
        group = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("nhd,chd->hnc", q[rows].float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_positions(scores.shape[1], context, prepared.window, q.device)[:, first:]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[rows] = torch.einsum("hnc,chd->nhd", weights, values).to(q.dtype)
    return out


def gather_context(cache: Tensor, blocks: Tensor, context: int) -> Tensor:
    """The first `context` tokens of a sequence, in order: [context, G, D], copied."""
    num_blocks = -(-context // cache.shape[1])
    return cache.index_select(0, blocks[:num_blocks]).flatten(0, 1)[:context]


def first_position(num_queries: int, context: int, prepared: PreparedAttention) -> int:
    """Where the block begins that holds the first position seen by the last `num_queries`."""
    if prepared.window is None:
        return 0
    first = max(0, context - num_queries - prepared.window + 1)
    return first // prepared.block_size * prepared.block_size


def visible_positions(
    num_queries: int, context: int, window: int | None, device: torch.device
) -> Tensor:
    """bool [num_queries, context]: which positions the last `num_queries` of a context see."""
    query = torch.arange(context - num_queries, context, device=device).unsqueeze(1)
    key = torch.arange(context, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
