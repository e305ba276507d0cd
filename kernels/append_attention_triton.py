"""Rotation, cache write and attention of decodes in one launch; `append_attention.py` defines it.

The grid is that of `attention_triton.py`: a program for each KV head and split of a decode row, or
for the whole row. Before it attends, a program does its part of `kv_append_triton.py`:

    every program   rotates the H / G queries of its head, into p_q, for itself. So do the others of
                    the row and head: they write the same bits to the same place
    the last one    rotates the key of its head, and writes key and value to the cache. It alone
                    reads the position that they are for

and waits until all its threads have written. A query costs 2 D bytes against the up to 4 SPLIT D
of a split's keys and values, which is why each split may rotate it again. What follows is
`attend_decode`, and the merge of several splits: the bits are those of the two kernels apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.attention import PreparedAttention, expect_attention_inputs
from millrace.kernels.attention_decode_triton import attend_decode, find_work, merge_kernel
from millrace.kernels.attention_triton import (
    LOG2_E,
    MERGE_OPTIONS,
    MERGE_UNROLL,
    MIN_BLOCK_M,
    SPLIT,
    attention_config,
    most_parts,
    split_scratch,
)
from millrace.kernels.checks import expect
from millrace.kernels.configs import UNFUSED
from millrace.kernels.kv_append import expect_append_inputs, expect_norms_and_scales
from millrace.kernels.kv_append_triton import rotated


@triton.jit(do_not_specialize=["num_decodes", "capacity"])
def append_attention_kernel(
    p_qkv,  # [T, (H + 2G) D]
    p_positions,  # i64 [T]
    p_write_index,  # i64 [T]
    p_cos_sin,  # f32 [max_position, D]
    p_q_norm,  # [D], with NORM
    p_k_norm,  # [D], with NORM
    p_q,  # [T, H, D], scratch
    p_k,  # [B, P, G, D]
    p_v,  # [B, P, G, D]
    p_block_table,  # i32 [S, max_blocks]
    p_slots,  # i64 [T]
    p_context_lens,  # i32 [T]
    p_out,  # [T, H, D]
    p_partial,  # f32 [capacity, H, D], unnormalised sums
    p_max,  # f32 [capacity, H], base-2 maxima
    p_sum,  # f32 [capacity, H]
    scale,  # scale * log2(e)
    num_decodes,
    capacity,
    stride_qkv,
    stride_cos_sin,
    stride_table,
    eps,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    Q_TILE: tl.constexpr,  # GROUP, padded
    DECODE_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    NORM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    i_item, i_kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_row, context, begin, end, part = find_work(
        i_item, p_context_lens, num_decodes, capacity, SPLIT, WINDOW
    )
    if (i_row < 0) | (begin >= end):
        return
    o_half = tl.arange(0, BLOCK_HALF)
    m_half = o_half < HALF
    p_angles = p_cos_sin + tl.load(p_positions + i_row) * stride_cos_sin
    p_token = p_qkv + i_row * stride_qkv

    o_head = tl.arange(0, Q_TILE)
    m_x = (o_head < GROUP)[:, None] & m_half[None, :]
    o_x = (i_kv_head * GROUP + o_head)[:, None] * HEAD_DIM + o_half[None, :]  # [Q_TILE, BLOCK_HALF]
    b_q1 = tl.load(p_token + o_x, mask=m_x, other=0.0)
    b_q2 = tl.load(p_token + o_x + HALF, mask=m_x, other=0.0)
    b_q1, b_q2 = rotated(b_q1, b_q2, p_q_norm, p_angles, eps, o_half, m_half, HALF, NORM)
    p_own = p_q + i_row * (NUM_KV_HEADS * GROUP * HEAD_DIM) + o_x
    tl.store(p_own, b_q1, mask=m_x)
    tl.store(p_own + HALF, b_q2, mask=m_x)

    i_cache = tl.load(p_write_index + i_row)
    if (end == context) & (i_cache >= 0):  # the last one; negative is padding
        m_kv = m_half[None, :]
        p_k_new = p_token + (NUM_KV_HEADS * GROUP + i_kv_head) * HEAD_DIM + o_half[None, :]
        p_v_new = p_k_new + NUM_KV_HEADS * HEAD_DIM  # [1, BLOCK_HALF]
        b_k1 = tl.load(p_k_new, mask=m_kv, other=0.0)
        b_k2 = tl.load(p_k_new + HALF, mask=m_kv, other=0.0)
        b_k1, b_k2 = rotated(b_k1, b_k2, p_k_norm, p_angles, eps, o_half, m_half, HALF, NORM)
        o_cache = (i_cache * NUM_KV_HEADS + i_kv_head) * HEAD_DIM + o_half[None, :]
        tl.store(p_k + o_cache, b_k1, mask=m_kv)
        tl.store(p_k + o_cache + HALF, b_k2, mask=m_kv)
        tl.store(p_v + o_cache, tl.load(p_v_new, mask=m_kv, other=0.0), mask=m_kv)
        tl.store(p_v + o_cache + HALF, tl.load(p_v_new + HALF, mask=m_kv, other=0.0), mask=m_kv)
    tl.debug_barrier()  # every thread has written, before one of them reads
    attend_decode(
        i_row, context, begin, end, part, i_kv_head, p_q, p_k + i_kv_head * HEAD_DIM,
        p_v + i_kv_head * HEAD_DIM, p_block_table, p_slots, None, p_out, p_partial, p_max, p_sum,
        scale, 0.0, NUM_KV_HEADS * GROUP * HEAD_DIM, HEAD_DIM, stride_table, False, NUM_KV_HEADS,
        GROUP, HEAD_DIM, BLOCK_D, DECODE_M, BLOCK_SIZE, SPLIT, TILE, WINDOW, False, UPCAST,
    )  # fmt: skip


def append_attention(
    qkv: Tensor,
    positions: Tensor,
    write_index: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
    prepared: PreparedAttention,
    *,
    scale: float,
) -> Tensor:
    """`append_attention_reference` in Triton; rows of qkv and cos_sin may lie at any stride."""
    expect_append_inputs(qkv, positions, write_index, cos_sin, k_cache, v_cache, num_heads)
    expect_norms_and_scales(q_norm_weight, k_norm_weight, None, qkv.dtype, k_cache)
    batch, window = prepared.batch, prepared.window or 0
    rows, (block_size, num_kv_heads, head_dim) = qkv.shape[0], k_cache.shape[1:]
    expect("slots", batch.slots, (rows,), torch.int64)
    q = torch.empty(rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    expect_attention_inputs(q, k_cache, v_cache, prepared.block_size, scale, None, None)
    out = torch.empty_like(q)
    if rows == 0:
        return out
    group, config = num_heads // num_kv_heads, attention_config(q.device, q.dtype, head_dim)
    cache_tokens = k_cache.shape[0] * block_size
    capacity = most_parts(rows, batch.max_context_len, window, cache_tokens)
    scratch = split_scratch(capacity, num_heads, head_dim, q.device)
    shared = {  # constants of both kernels
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(MIN_BLOCK_M, triton.next_power_of_2(head_dim)),
        "SPLIT": SPLIT,
        "WINDOW": window,
    }
    append_attention_kernel[(rows + capacity, num_kv_heads)](
        qkv, positions, write_index, cos_sin, q_norm_weight, k_norm_weight, q, k_cache, v_cache,
        batch.block_table, batch.slots, batch.context_lens, out, *scratch, scale * LOG2_E, rows,
        capacity, qkv.stride(0), cos_sin.stride(0), batch.block_table.stride(0), eps,
        NUM_KV_HEADS=num_kv_heads, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        Q_TILE=triton.next_power_of_2(group),
        DECODE_M=max(MIN_BLOCK_M, triton.next_power_of_2(group)), BLOCK_SIZE=block_size,
        TILE=config.constants["TILE"], NORM=q_norm_weight is not None,
        UPCAST=q.device.type == "cpu" and q.dtype == torch.bfloat16,
        **shared, **config.options, **UNFUSED,
    )  # fmt: skip
    if capacity:
        merge_kernel[(rows, num_heads)](
            *scratch, batch.context_lens, None, out, rows, capacity, SCALED=False,
            UNROLL=MERGE_UNROLL, **shared, **MERGE_OPTIONS,
        )  # fmt: skip
    return out
