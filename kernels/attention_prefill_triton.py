"""Paged attention, the branch for prefill chunks: one block of queries over all that it sees.

A program owns BLOCK_M // (H / G) consecutive queries of one row, with the H / G heads of one KV
head: row r of its tile is query r // (H / G), head r % (H / G). It walks their context once, a tile
at a time (FlashAttention-2, Dao 2023), and folds at each multiple of SPLIT, which makes its sums
those of the decode branch and the merge. Two states in registers are the price of that.
"""

import triton
import triton.language as tl

from millrace.kernels.attention_tiles_triton import attend_span, load_queries, store_result


@triton.jit
def row_of_block(p_query_start, i_block, num_decodes, num_rows, BLOCK_Q: tl.constexpr):
    """The prefill row that query block i_block belongs to, by bisection.

    With rows and tokens counted from the first prefill, the blocks of row i are numbered from
    query_start[i] // BLOCK_Q + i on: room for all of them, with at most one number to spare.
    """
    low = num_decodes
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(p_query_start + middle) - num_decodes
        if start // BLOCK_Q + middle - num_decodes <= i_block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def attend_prefill(
    i_block,
    i_kv_head,
    p_q,
    p_k,  # of this KV head, as p_v
    p_v,
    p_block_table,
    p_slots,
    p_query_start,
    p_context_lens,
    p_v_scale,
    p_out,
    scale,
    softcap_log2,
    num_decodes,
    num_rows,
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
    """One block of queries of one prefill row, over all positions that it sees."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    i_row = row_of_block(p_query_start, i_block, num_decodes, num_rows, BLOCK_Q)
    start = tl.load(p_query_start + i_row)
    num_queries = tl.load(p_query_start + i_row + 1) - start
    i_row_block = i_block - (start - num_decodes) // BLOCK_Q - (i_row - num_decodes)
    i_query = i_row_block * BLOCK_Q
    if i_query < num_queries:
        context = tl.load(p_context_lens + i_row)
        position = context - num_queries + i_query  # of the block's first query
        end = tl.minimum(position + BLOCK_Q, context)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(position - WINDOW + 1, 0)
        o_m = tl.arange(0, BLOCK_M)
        o_query = i_query + o_m // GROUP
        m_m = (o_query < num_queries) & (o_m < BLOCK_Q * GROUP)
        o_head = i_kv_head * GROUP + o_m % GROUP
        o_token = (start + o_query).to(tl.int64)
        b_q = load_queries(
            p_q, o_token, o_head, m_m, stride_q_token, stride_q_head, HEAD_DIM, BLOCK_D, UPCAST
        )
        o_position = position + o_m // GROUP
        p_table = p_block_table + tl.load(p_slots + i_row) * stride_table
        # First the tiles that every query sees whole, then those with the edge of some query.
        _, b_sum, b_acc = attend_span(
            b_q, o_position, p_k, p_v, p_table, first // TILE * TILE, (position + 1) // TILE * TILE,
            first, end, scale, softcap_log2, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_M,
            BLOCK_D, SPLIT, TILE, WINDOW, SOFTCAP, WINDOW == 0,
        )  # fmt: skip
        o_row_head = o_token * (NUM_KV_HEADS * GROUP) + o_head
        store_result(
            p_out, o_row_head, m_m, b_sum, b_acc, p_v_scale, i_kv_head, HEAD_DIM, BLOCK_D, SCALED
        )
