"""Paged attention by xformers, as a second opinion; `attention.py` says what it computes.

Decodes go to its split-K kernel (`fmha.triton_splitk`) through a paged bias, the pool of blocks
seen as one sequence [1, B * P, G, H / G, D]. That kernel takes causal rows of one length only, so
prefill chunks are gathered row by row and left to the kernel that xformers picks.

It knows no soft cap, no window over pages and no scales by head, wants blocks of a multiple of 64
tokens and a head dimension that is a power of two, and is not batch-invariant: its number of splits
follows from the batch. Lengths are read by the host, once per step: no graph can replay it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias as biases
from xformers.ops.fmha import triton_splitk

from millrace.kernels.attention import (
    AttentionBatch,
    KVScales,
    PreparedAttention,
    expect_attention_inputs,
    gather_context,
    prepare_attention,
)

BLOCK_MULTIPLE = 64  # tokens of the split-K kernel's step, which may not cross a block


@dataclass(frozen=True, slots=True)
class XformersAttention:
    """A prepared batch: one bias for all decodes, and each prefill chunk by itself."""

    prepared: PreparedAttention
    decode_bias: Any  # fmha's paged bias; None without decodes
    prefills: list[tuple[slice, Tensor, int]]  # queries, blocks, context


def prepare_attention_xformers(
    batch: AttentionBatch, block_size: int, window: int | None = None
) -> XformersAttention:
    """Check the batch and bring its lengths to the host; ValueError names what xformers has not."""
    if window is not None:
        raise ValueError(f"window: expected None for xformers, got {window}")
    if block_size % BLOCK_MULTIPLE:
        raise ValueError(
            f"block_size: expected a multiple of {BLOCK_MULTIPLE} tokens for xformers,"
            f" got {block_size}"
        )
    prepared = prepare_attention(batch, block_size)
    n, contexts, starts = batch.num_decodes, batch.context_lens.tolist(), batch.query_start.tolist()
    tables = batch.block_table[batch.slots].clamp(min=0)
    bias = None
    if n:
        bias = biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * n,
            kv_seqlen=contexts[:n],
            block_tables=tables[:n],
            page_size=block_size,
            device=tables.device,
        )
    prefills = [
        (slice(starts[i], starts[i + 1]), tables[i], contexts[i])
        for i in range(n, len(contexts))
        if starts[i] < starts[i + 1]
    ]
    return XformersAttention(prepared, bias, prefills)


def paged_attention_xformers(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: XformersAttention,
    *,
    scale: float,
    softcap: float | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`paged_attention_reference` by xformers, in fp16 and bf16: q [T, H, D] -> [T, H, D]."""
    block_size = prepared.prepared.block_size
    expect_attention_inputs(q, k_cache, v_cache, block_size, scale, softcap, kv_scales)
    if softcap is not None:
        raise ValueError(f"softcap: expected None for xformers, got {softcap}")
    if kv_scales is not None or k_cache.dtype != q.dtype:
        raise ValueError(f"k_cache: expected {q.dtype} for xformers, got {k_cache.dtype}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n = prepared.prepared.batch.num_decodes
    if n:
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        op = triton_splitk.FwOp
        out[:n] = _attend(q[:n], keys, values, prepared.decode_bias, scale, op)
    for queries, blocks, context in prepared.prefills:
        keys, values = (gather_context(cache, blocks, context) for cache in (k_cache, v_cache))
        bias = biases.LowerTriangularFromBottomRightMask()
        out[queries] = _attend(q[queries], keys, values, bias, scale, None)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Any, scale: float, op: Any) -> Tensor:
    """q [n, H, D] over keys and values [c, G, D] -> [n, H, D]; stride 0 tells fmha of groups."""
    num_kv_heads = keys.shape[1]
    shape = (1, -1, num_kv_heads, q.shape[1] // num_kv_heads, q.shape[2])
    keys, values = (x[None, :, :, None].expand(-1, -1, -1, shape[3], -1) for x in (keys, values))
    attended: Tensor = fmha.memory_efficient_attention_forward(
        q.reshape(shape), keys, values, bias, scale=scale, op=op
    )
    return attended.reshape(q.shape)
