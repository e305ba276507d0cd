"""Paged attention, the branch for decodes: splits of rows side by side, and the merge of a row's.

Flash-Decoding (Dao et al. 2023) with splits of a fixed size, positions i * SPLIT ..
(i + 1) * SPLIT - 1 of a row. A program owns one split of one row, for one KV head; the row's H / G
queries of that head are padded to BLOCK_M rows, 16 or more, as a matrix instruction takes no fewer.
It leaves (acc, m, l) in scratch to `merge_kernel`, which folds a row's splits in ascending order.

Scratch is for `capacity` splits, not for the longest context in each row: 256 rows of 32 heads of
128 with contexts up to 128k would need 2 GB. The rows' splits lie one row after the other, and the
grid lists

    i < num_decodes     all of row i, where it is one split, or where its splits do not fit
    num_decodes + i     split i of scratch

A row that does not fit is walked by one program a head with the same arithmetic, and so to the same
bits. `most_parts` of `attention_triton.py` says why there is work enough for the device then.

Example, SPLIT = 256: contexts of 300, 40 and 600 tokens have 2, 1 and 3 splits. The first row's are
0 and 1 of scratch, the third row's 2, 3 and 4; program 1 of the grid does the second row. With a
window of 40 the first row's first visible position is 260: it has one split, and needs no scratch.
"""

import triton
import triton.language as tl

from millrace.kernels.attention_tiles_triton import (
    attend_span,
    empty_state,
    fold,
    load_queries,
    store_result,
)

ROWS = tl.constexpr(256)  # whose splits are counted at a time


@triton.jit
def first_seen(context, WINDOW: tl.constexpr):
    """The first position that the last token of a context sees."""
    return tl.maximum(context - WINDOW, 0) if WINDOW > 0 else context * 0


@triton.jit
def parts_of(context, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """Splits that a decode has in scratch: none where it has only one."""
    count = tl.cdiv(context, SPLIT) - first_seen(context, WINDOW) // SPLIT
    return tl.where(count > 1, count, 0)


@triton.jit
def find_row(i_item, p_context_lens, num_decodes, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """(row of this item, splits in scratch of the rows before it); row num_decodes: there is none.

    The sum over the rows is taken by each program: it waits for no other, and nothing is stored.
    """
    i_row, before, total = 0, 0, 0
    for i_first in range(0, num_decodes, ROWS):
        o_row = i_first + tl.arange(0, ROWS)
        m_row = o_row < num_decodes
        b_parts = parts_of(tl.load(p_context_lens + o_row, mask=m_row, other=0), SPLIT, WINDOW)
        b_end = total + tl.cumsum(b_parts, axis=0)
        m_before = tl.where(i_item < num_decodes, o_row < i_item, b_end <= i_item - num_decodes)
        m_before = m_before & m_row
        i_row += tl.sum(m_before.to(tl.int32), axis=0)
        before += tl.sum(tl.where(m_before, b_parts, 0), axis=0)
        total += tl.sum(b_parts, axis=0)
    return i_row, before


@triton.jit
def find_work(
    i_item, p_context_lens, num_decodes, capacity, SPLIT: tl.constexpr, WINDOW: tl.constexpr
):
    """(row, its context, begin, end, part) of an item of the grid.

    Positions begin .. end - 1 belong to it; `part` is their place in scratch, -1 where they are all
    that the row sees. Row -1: the item has no work.
    """
    i_row, before = find_row(i_item, p_context_lens, num_decodes, SPLIT, WINDOW)
    context, begin, end, part = 0, 0, 0, -1
    if i_row < num_decodes:
        context = tl.load(p_context_lens + i_row)
        parts = parts_of(context, SPLIT, WINDOW)
        begin = first_seen(context, WINDOW) // SPLIT * SPLIT
        end = context
        fits = before + parts <= capacity
        if i_item < num_decodes:
            if fits & (parts > 0):
                i_row = -1
        else:
            part = i_item - num_decodes
            begin += (part - before) * SPLIT
            end = tl.minimum(begin + SPLIT, context)
            if not fits:
                i_row = -1
    else:
        i_row = -1
    return i_row.to(tl.int64), context, begin, end, part


@triton.jit
def attend_decode(
    i_row,  # what `find_work` gave
    context,
    begin,
    end,
    part,
    i_kv_head,
    p_q,
    p_k,  # of this KV head, as p_v
    p_v,
    p_block_table,
    p_slots,
    p_v_scale,
    p_out,
    p_partial,
    p_max,
    p_sum,
    scale,
    softcap_log2,
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
    """A span of one decode row: the row's result if it sees nothing else, else its state."""
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < GROUP
    o_head = i_kv_head * GROUP + o_m
    o_token = i_row + tl.zeros([BLOCK_M], tl.int64)  # a decode's row is its token
    b_q = load_queries(
        p_q, o_token, o_head, m_m, stride_q_token, stride_q_head, HEAD_DIM, BLOCK_D, UPCAST
    )
    o_position = context - 1 + tl.zeros([BLOCK_M], tl.int32)
    p_table = p_block_table + tl.load(p_slots + i_row) * stride_table
    first = first_seen(context, WINDOW)
    # Tiles before the window are skipped; a tile that runs holds a visible position.
    b_max, b_sum, b_acc = attend_span(
        b_q, o_position, p_k, p_v, p_table, tl.maximum(begin, first // TILE * TILE), 0, first, end,
        scale, softcap_log2, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D, SPLIT,
        TILE, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    if part < 0:
        o_row_head = i_row * num_heads + o_head
        store_result(
            p_out, o_row_head, m_m, b_sum, b_acc, p_v_scale, i_kv_head, HEAD_DIM, BLOCK_D, SCALED
        )
    else:
        o_d = tl.arange(0, BLOCK_D)
        m_md = m_m[:, None] & (o_d < HEAD_DIM)[None, :]
        o_part = part.to(tl.int64) * num_heads + o_head
        tl.store(p_partial + o_part[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_md)
        tl.store(p_max + o_part, b_max, mask=m_m)
        tl.store(p_sum + o_part, b_sum, mask=m_m)


@triton.jit(do_not_specialize=["num_decodes", "capacity"])
def merge_kernel(
    p_partial,  # f32 [capacity, H, D]
    p_max,  # f32 [capacity, H]
    p_sum,  # f32 [capacity, H]
    p_context_lens,  # i32 [R]
    p_v_scale,  # f32 [G]
    p_out,  # [T, H, D]
    num_decodes,
    capacity,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The splits of one decode row and head, folded in ascending order."""
    i_row, before = find_row(tl.program_id(0), p_context_lens, num_decodes, SPLIT, WINDOW)
    i_head, num_heads = tl.program_id(1), tl.num_programs(1)
    count = parts_of(tl.load(p_context_lens + i_row), SPLIT, WINDOW)
    if (count == 0) | (before + count > capacity):  # final as one program left it
        return

    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD_DIM)[None, :]
    b_max, b_sum, b_acc = empty_state(1, BLOCK_D)
    for i_chunk in range(0, count, UNROLL):
        for j in tl.static_range(UNROLL):  # loads side by side: the sums are a chain
            m_split = i_chunk + j < count
            o_part = (before + i_chunk + j + tl.zeros([1], tl.int64)) * num_heads + i_head
            b_max_split = tl.load(p_max + o_part, mask=m_split, other=float("-inf"))
            b_sum_split = tl.load(p_sum + o_part, mask=m_split, other=0.0)
            p_part = p_partial + o_part[:, None] * HEAD_DIM + o_d[None, :]
            b_acc_split = tl.load(p_part, mask=m_split & m_d, other=0.0)
            b_max, b_sum, b_acc = fold(b_max, b_sum, b_acc, b_max_split, b_sum_split, b_acc_split)
    o_row_head = i_row.to(tl.int64) * num_heads + i_head + tl.zeros([1], tl.int64)
    m_row = tl.full([1], True, tl.int1)
    store_result(
        p_out,
        o_row_head,
        m_row,
        b_sum,
        b_acc,
        p_v_scale,
        i_head // GROUP,
        HEAD_DIM,
        BLOCK_D,
        SCALED,
    )
