"""Paged attention on a GPU, in Triton; `attention.py` says what it computes.

Decode rows (one query each): a program owns one row, one KV head and one split of SPLIT positions.
The H / G query heads that share the KV head are packed into one tile, padded to BLOCK_M rows (a
matrix instruction takes no fewer than 16), so K and V are read once. It walks its split in tiles of
TILE tokens, finds each token's block in the table, and keeps an online softmax (Milakov and
Gimelshein 2018) in float32 and base 2. A second kernel merges the splits of a row that has several
(Flash-Decoding, Dao et al. 2023):

    m = max m_s      l = sum 2^(m_s - m) l_s      out = sum 2^(m_s - m) acc_s / l

in ascending order of s. Split s holds positions s * SPLIT .. (s + 1) * SPLIT - 1, fixed whatever
the batch, and one split alone merges to acc / l exactly: so a row has the same bits alone as among
others. With SPLIT = 256, a context of 300 tokens has splits 0..255 and 256..299; with a window of
40 its first visible position is 260, and only split 1 runs.

The grid is an upper bound from max_context_len, known to the host, and surplus programs return at
once: a launch never waits for the device, and a graph may replay it.

Prefill rows go to the reference.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.attention import (
    AttentionBatch,
    PreparedAttention,
    expect_attention_inputs,
    paged_attention_reference,
)

SPLIT = 256  # positions of a program; a part of the result's bits
TILE = 64  # positions of a step inside it; a multiple divides SPLIT
MIN_BLOCK_M = 16  # rows of the smallest matrix instruction
NUM_WARPS = 4
NUM_STAGES = 2
LOG2_E = 1.4426950408889634


@triton.jit
def _decode_kernel(
    p_q,  # [T, H, D]
    p_k,  # [B, P, G, D]
    p_v,  # [B, P, G, D]
    p_block_table,  # i32 [S, max_blocks]
    p_slots,  # i64 [R]
    p_context_lens,  # i32 [R]
    p_out,  # [T, H, D]
    p_partial,  # f32 [R, H, num_splits, D], unnormalised sums
    p_max,  # f32 [R, H, num_splits], base-2 maxima
    p_sum,  # f32 [R, H, num_splits]
    scale_log2,  # scale * log2(e); with a soft cap, scale / softcap
    softcap_log2,  # softcap * log2(e)
    stride_q_token,
    stride_q_head,
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bf16 as if it were uint16
):
    i_row = tl.program_id(0).to(tl.int64)
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    num_splits = tl.num_programs(2)
    context = tl.load(p_context_lens + i_row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    begin = i_split * SPLIT
    end = tl.minimum(begin + SPLIT, context)
    if (begin >= context) | (end <= first):
        return

    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    m_md = (o_m[:, None] < GROUP) & m_d[None, :]
    o_head = i_kv_head * GROUP + o_m
    p_q_tile = p_q + i_row * stride_q_token + o_head[:, None] * stride_q_head + o_d[None, :]
    b_q = tl.load(p_q_tile, mask=m_md, other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        b_q = b_q.to(tl.float32)
    p_table = p_block_table + tl.load(p_slots + i_row) * stride_table

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Whole tiles before the window are skipped; a tile that runs holds a visible token.
    for i_tile in range(tl.maximum(begin, first // TILE * TILE), end, TILE):
        o_n = i_tile + tl.arange(0, TILE)
        m_n = (o_n >= first) & (o_n < end)
        b_block = tl.load(p_table + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
        o_cache_row = (b_block * BLOCK_SIZE + o_n % BLOCK_SIZE) * num_kv_heads + i_kv_head
        o_kv = o_cache_row[:, None] * HEAD_DIM + o_d[None, :]  # [TILE, BLOCK_D]
        m_kv = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_v + o_kv, mask=m_kv, other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2  # [BLOCK_M, TILE]
        if SOFTCAP:
            b_s = softcap_log2 * (2.0 * tl.sigmoid(2.0 * b_s) - 1.0)  # tanh
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_rescale[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new_max

    o_row_head = i_row * num_kv_heads * GROUP + o_head
    if (first // SPLIT == i_split) & (end == context):  # the row's only split
        p_o = p_out + o_row_head[:, None] * HEAD_DIM + o_d[None, :]
        tl.store(p_o, (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_md)
    else:
        o_part = o_row_head * num_splits + i_split
        tl.store(p_partial + o_part[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_md)
        tl.store(p_max + o_part, b_max, mask=o_m < GROUP)
        tl.store(p_sum + o_part, b_sum, mask=o_m < GROUP)


@triton.jit
def _merge_kernel(
    p_partial,  # f32 [R, H, num_splits, D]
    p_max,  # f32 [R, H, num_splits]
    p_sum,  # f32 [R, H, num_splits]
    p_context_lens,  # i32 [R]
    p_out,  # [T, H, D]
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_row_head = i_row * tl.num_programs(1) + tl.program_id(1)
    context = tl.load(p_context_lens + i_row)
    first_split = 0
    if WINDOW > 0:
        first_split = tl.maximum(context - WINDOW, 0) // SPLIT
    end_split = tl.cdiv(context, SPLIT)
    if end_split - first_split < 2:  # written by the decode kernel
        return

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_part = i_row_head * num_splits
    total_max = tl.load(p_max + o_part + first_split)
    for i_split in range(first_split + 1, end_split):
        total_max = tl.maximum(total_max, tl.load(p_max + o_part + i_split))
    total_sum = 0.0
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    for i_split in range(first_split, end_split):
        weight = tl.exp2(tl.load(p_max + o_part + i_split) - total_max)
        total_sum += weight * tl.load(p_sum + o_part + i_split)
        p_split = p_partial + (o_part + i_split) * HEAD_DIM + o_d
        b_acc += weight * tl.load(p_split, mask=m_d, other=0.0)
    p_o = p_out + i_row_head * HEAD_DIM + o_d
    tl.store(p_o, (b_acc / total_sum).to(p_out.dtype.element_ty), mask=m_d)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: PreparedAttention,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`paged_attention_reference` with the decode rows in Triton: q [T, H, D] -> [T, H, D].

    q may be strided but for its last dimension. ValueError names what does not fit.
    """
    expect_attention_inputs(q, k_cache, v_cache, prepared.block_size, softcap)
    if q.stride(-1) != 1:
        raise ValueError(f"q: expected a last stride of 1, got {q.stride(-1)}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_decodes = prepared.batch.num_decodes
    if num_decodes:
        _launch_decodes(q, k_cache, v_cache, prepared, out, scale, softcap)
    if num_decodes < prepared.batch.slots.shape[0]:
        prefills = replace(prepared, batch=_without_decodes(prepared.batch))
        out[num_decodes:] = paged_attention_reference(
            q[num_decodes:], k_cache, v_cache, prefills, scale=scale, softcap=softcap
        )
    return out


def _launch_decodes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: PreparedAttention,
    out: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    batch, window = prepared.batch, prepared.window or 0
    num_rows, num_heads = batch.num_decodes, q.shape[1]
    num_kv_heads, head_dim = k_cache.shape[2:]
    group, block_d = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    num_splits = triton.cdiv(batch.max_context_len, SPLIT)
    partial = torch.empty(num_rows, num_heads, num_splits, head_dim, device=q.device)
    maxima = torch.empty(num_rows, num_heads, num_splits, device=q.device)
    sums = torch.empty_like(maxima)
    _decode_kernel[(num_rows, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        batch.block_table,
        batch.slots,
        batch.context_lens,
        out,
        partial,
        maxima,
        sums,
        scale * LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        q.stride(0),
        q.stride(1),
        batch.block_table.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=max(MIN_BLOCK_M, triton.next_power_of_2(group)),
        BLOCK_D=max(MIN_BLOCK_M, block_d),
        BLOCK_SIZE=prepared.block_size,
        SPLIT=SPLIT,
        TILE=TILE,
        WINDOW=window,
        SOFTCAP=softcap is not None,
        UPCAST=q.device.type == "cpu" and q.dtype == torch.bfloat16,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if num_splits > 1:
        _merge_kernel[(num_rows, num_heads)](
            partial,
            maxima,
            sums,
            batch.context_lens,
            out,
            num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=max(MIN_BLOCK_M, block_d),
            SPLIT=SPLIT,
            WINDOW=window,
        )


def _without_decodes(batch: AttentionBatch) -> AttentionBatch:
    """The prefill rows of a batch, for q without its first num_decodes tokens."""
    n = batch.num_decodes
    return replace(
        batch,
        slots=batch.slots[n:],
        query_start=batch.query_start[n:] - n,
        context_lens=batch.context_lens[n:],
        num_decodes=0,
    )
