"""Paged attention, the branch for decodes: one split of one row, and the merge of a row's splits.

Flash-Decoding (Dao et al. 2023) with splits of a fixed size. A program owns one decode row, one KV
head and positions i * SPLIT .. (i + 1) * SPLIT - 1. The row's H / G queries of that head are padded
to BLOCK_M rows, 16 or more, as a matrix instruction takes no fewer. It leaves (acc, m, l) to
`merge_kernel`, which folds them in ascending order; the only split of a row is final as it is, for
folding one state into none changes no bit.

Example, SPLIT = 256: a context of 300 tokens has splits 0..255 and 256..299. With a window of 40
its first visible position is 260, and only the second one runs.
"""

import triton
import triton.language as tl

from millrace.kernels.attention_tiles_triton import (
    attend_tile,
    empty_state,
    fold,
    load_queries,
    result,
)


@triton.jit
def attend_decode(
    i_item,
    i_kv_head,
    p_q,
    p_k,  # of this KV head, as p_v
    p_v,
    p_block_table,
    p_slots,
    p_context_lens,
    p_v_scale,
    p_out,
    p_partial,
    p_max,
    p_sum,
    scale,
    softcap_log2,
    num_splits,
    stride_q_token,
    stride_q_head,
    stride_table,
    SCALED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One split of one decode row: its result if the row has no other, else its state."""
    i_row = (i_item // num_splits).to(tl.int64)
    context = tl.load(p_context_lens + i_row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    i_split = i_item % num_splits  # among those that the row sees
    begin = (first // SPLIT + i_split) * SPLIT
    if (begin < context) | (i_split == 0):  # a row without context has one split, an empty one
        end = tl.minimum(begin + SPLIT, context)
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < GROUP
        o_head = i_kv_head * GROUP + o_m
        o_token = i_row + tl.zeros([BLOCK_M], tl.int64)  # a decode's row is its token
        b_q = load_queries(
            p_q, o_token, o_head, m_m, stride_q_token, stride_q_head, HEAD_DIM, BLOCK_D, UPCAST
        )
        o_position = context - 1 + tl.zeros([BLOCK_M], tl.int32)
        p_table = p_block_table + tl.load(p_slots + i_row) * stride_table
        b_max, b_sum, b_acc = empty_state(BLOCK_M, BLOCK_D)
        # Tiles before the window are skipped; a tile that runs holds a visible position.
        for i_tile in range(tl.maximum(begin, first // TILE * TILE), end, TILE):
            b_max, b_sum, b_acc = attend_tile(
                b_max, b_sum, b_acc, b_q, o_position, p_k, p_v, p_table, i_tile, first, end,
                scale, softcap_log2, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, TILE,
                WINDOW, SOFTCAP, True,
            )  # fmt: skip
        o_row_head = i_row * (NUM_KV_HEADS * GROUP) + o_head
        o_d = tl.arange(0, BLOCK_D)
        m_md = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
        if (i_split == 0) & (end == context):
            b_out = result(b_acc, b_sum, p_v_scale, i_kv_head, SCALED)
            p_row = p_out + o_row_head[:, None] * HEAD_DIM + o_d[None, :]
            tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_md)
        else:
            o_part = o_row_head * num_splits + i_split
            tl.store(p_partial + o_part[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_md)
            tl.store(p_max + o_part, b_max, mask=m_m)
            tl.store(p_sum + o_part, b_sum, mask=m_m)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    p_partial,  # f32 [num_decodes, H, num_splits, D]
    p_max,  # f32 [num_decodes, H, num_splits]
    p_sum,  # f32 [num_decodes, H, num_splits]
    p_context_lens,  # i32 [R]
    p_v_scale,  # f32 [G]
    p_out,  # [T, H, D]
    num_splits,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The splits of one decode row and head, folded in ascending order."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    context = tl.load(p_context_lens + i_row)
    first_split = 0
    if WINDOW > 0:
        first_split = tl.maximum(context - WINDOW, 0) // SPLIT
    count = tl.cdiv(context, SPLIT) - first_split
    if count < 2:  # final as the split's program left it
        return

    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD_DIM)[None, :]
    i_row_head = i_row * tl.num_programs(1) + i_head
    o_part = i_row_head * num_splits
    b_max, b_sum, b_acc = empty_state(1, BLOCK_D)
    for i_chunk in range(0, count, UNROLL):
        for j in tl.static_range(UNROLL):  # loads side by side: the sums are a chain
            m_split = i_chunk + j < count
            o_split = o_part + i_chunk + j + tl.zeros([1], tl.int32)
            b_max_split = tl.load(p_max + o_split, mask=m_split, other=float("-inf"))
            b_sum_split = tl.load(p_sum + o_split, mask=m_split, other=0.0)
            p_split = p_partial + o_split[:, None] * HEAD_DIM + o_d[None, :]
            b_acc_split = tl.load(p_split, mask=m_split & m_d, other=0.0)
            b_max, b_sum, b_acc = fold(b_max, b_sum, b_acc, b_max_split, b_sum_split, b_acc_split)
    b_out = result(b_acc, b_sum, p_v_scale, i_head // GROUP, SCALED)
    p_row = p_out + i_row_head * HEAD_DIM + o_d[None, :]
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_d)
