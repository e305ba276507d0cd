"""Paged attention, the arithmetic that all programs share: a tile, a split, a span, a result.

A tile is TILE consecutive positions of one sequence. `attend_tile` adds it to a running softmax
(Milakov and Gimelshein 2018) in float32 and base 2, over the state (m, l, acc):

    m' = max(m, max s)             p = 2^(s - m')
    l' = l 2^(m - m') + sum p      acc' = acc 2^(m - m') + p V

A split is SPLIT positions, at multiples of SPLIT. Each has a state of its own, and `fold` adds one
to those before it, in ascending order:

    m' = max(m, m_s)     l' = l 2^(m - m') + l_s 2^(m_s - m')     acc' likewise

Whoever computes a position does these steps in this order. So its bits are the same whether other
programs held some of its splits (decodes) or one program walked them all (`attend_span`).

Three details make that hold:

- A masked score is -inf and adds an exact 0: a tile or split with nothing to see changes no bit,
  and may as well be skipped.
- p is summed in fixed point. The mantissa of p + 1 is round(p * 2^23); integer sums come out the
  same in whatever order threads and warps add, and that order differs between tile shapes. The
  error of a weight, 2^-24 of the largest one, is float32's own.
- Every product that meets a sum is an explicit `fma`, and kernels are launched without fusion of
  any other: nothing is left to what a compiler fuses in one place and not in another.
"""

import triton
import triton.language as tl

ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0 in float32
FIXED_POINT = tl.constexpr(2.0**-23)  # worth of the last mantissa bit of a float in [1, 2)


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(m, l, acc) of no position at all."""
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    return b_max, b_sum, b_acc


@triton.jit
def finite(b_max):
    """The maximum to subtract: any number will do where nothing was seen, but -inf."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def fold(b_max, b_sum, b_acc, b_max_split, b_sum_split, b_acc_split):
    """The state of all splits up to one, from the state before it and its own."""
    b_new_max = tl.maximum(b_max, b_max_split)
    b_subtract = finite(b_new_max)
    b_old = tl.exp2(b_max - b_subtract)
    b_new = tl.exp2(b_max_split - b_subtract)
    b_sum = tl.fma(b_sum_split, b_new, b_sum * b_old)
    return b_new_max, b_sum, tl.fma(b_acc_split, b_new[:, None], b_acc * b_old[:, None])


@triton.jit
def cache_rows(
    p_table, i_tile, o_n, m_n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """int64 [TILE]: block * P + offset of positions o_n, which begin at i_tile, a multiple of TILE.

    A tile that lies in one block needs one entry of the table.
    """
    if BLOCK_SIZE % TILE == 0:
        i_block = tl.load(p_table + i_tile // BLOCK_SIZE).to(tl.int64)
        return i_block * BLOCK_SIZE + (o_n % BLOCK_SIZE)
    if MASKED:
        b_block = tl.load(p_table + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
    else:
        b_block = tl.load(p_table + o_n // BLOCK_SIZE).to(tl.int64)
    return b_block * BLOCK_SIZE + o_n % BLOCK_SIZE


@triton.jit
def attend_tile(
    b_max,  # f32 [BLOCK_M]
    b_sum,  # f32 [BLOCK_M]
    b_acc,  # f32 [BLOCK_M, BLOCK_D]
    b_q,  # [BLOCK_M, BLOCK_D]
    o_position,  # i32 [BLOCK_M], of each query
    p_k,  # of this KV head
    p_v,
    p_table,  # of this sequence
    i_tile,  # the tile's first position, a multiple of TILE
    first,  # some query sees positions first .. end - 1; others are never read
    end,
    scale,  # of the raw scores to base 2; with a soft cap, scale / softcap
    softcap_log2,  # softcap * log2(e)
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,  # elements of a cache row: G * D
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,  # False where every query sees the whole tile
):
    """One tile more: (m, l, acc)."""
    o_n = i_tile + tl.arange(0, TILE)
    o_d = tl.arange(0, BLOCK_D)
    m_n = (o_n >= first) & (o_n < end)
    o_row = cache_rows(p_table, i_tile, o_n, m_n, BLOCK_SIZE, TILE, MASKED)
    o_kv = o_row[:, None] * ROW + o_d[None, :]  # [TILE, BLOCK_D]
    m_kv = m_n[:, None] & (o_d < HEAD_DIM)[None, :]
    if MASKED:
        b_k = tl.load(p_k + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_v + o_kv, mask=m_kv, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        b_k = tl.load(p_k + o_kv)
        b_v = tl.load(p_v + o_kv)
    else:
        b_k = tl.load(p_k + o_kv, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
        b_v = tl.load(p_v + o_kv, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    b_k = b_k.to(b_q.dtype)  # fp8 to the dtype of q is exact
    b_v = b_v.to(b_q.dtype)

    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, TILE]
    if SOFTCAP:
        b_s = softcap_log2 * tl.fma(tl.sigmoid(b_s * (2.0 * scale)), 2.0, -1.0)  # tanh
        scale = 1.0
    if MASKED:
        m_s = o_n[None, :] <= o_position[:, None]
        if WINDOW > 0:
            m_s = m_s & (o_n[None, :] > o_position[:, None] - WINDOW)
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
    b_subtract = finite(b_new_max)
    b_p = tl.exp2(tl.fma(b_s, scale, -b_subtract[:, None]))
    b_fixed = (b_p + 1.0).to(tl.int32, bitcast=True) - ONE_BITS
    b_tile_sum = tl.sum(b_fixed, axis=1).to(tl.float32) * FIXED_POINT
    b_rescale = tl.exp2(b_max - b_subtract)
    b_sum = tl.fma(b_sum, b_rescale, b_tile_sum)
    b_acc = tl.dot(b_p.to(b_q.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_new_max, b_sum, b_acc


@triton.jit
def attend_span(
    b_q,  # [BLOCK_M, BLOCK_D]
    o_position,  # i32 [BLOCK_M], of each query
    p_k,  # of this KV head, as p_v
    p_v,
    p_table,  # of this sequence
    begin,  # a multiple of TILE
    whole,  # with WHOLE: every query sees all of the tiles before this one
    first,  # some query sees positions first .. end - 1
    end,
    scale,
    softcap_log2,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The state of positions begin .. end - 1, folded at each multiple of SPLIT.

    A span within one split gives that split's state: folding it into none changes no bit.
    """
    b_max, b_sum, b_acc = empty_state(BLOCK_M, BLOCK_D)  # of the splits so far
    b_max_split, b_sum_split, b_acc_split = empty_state(BLOCK_M, BLOCK_D)
    for MASKED in tl.static_range(2):
        if MASKED:
            lower = begin
            upper = end
            if WHOLE:
                lower = tl.maximum(begin, whole)
        else:
            lower = begin
            upper = whole
        if MASKED or WHOLE:
            for i_tile in range(lower, upper, TILE):
                if i_tile % SPLIT == 0:
                    b_max, b_sum, b_acc = fold(
                        b_max, b_sum, b_acc, b_max_split, b_sum_split, b_acc_split
                    )
                    b_max_split, b_sum_split, b_acc_split = empty_state(BLOCK_M, BLOCK_D)
                b_max_split, b_sum_split, b_acc_split = attend_tile(
                    b_max_split, b_sum_split, b_acc_split, b_q, o_position, p_k, p_v, p_table,
                    i_tile, first, end, scale, softcap_log2, BLOCK_SIZE, ROW, HEAD_DIM, BLOCK_D,
                    TILE, WINDOW, SOFTCAP, MASKED,
                )  # fmt: skip
    return fold(b_max, b_sum, b_acc, b_max_split, b_sum_split, b_acc_split)


@triton.jit
def load_queries(
    p_q,
    o_token,  # i64 [BLOCK_M]
    o_head,  # i64 [BLOCK_M]
    m_row,  # [BLOCK_M]
    stride_q_token,
    stride_q_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    p_row = p_q + o_token * stride_q_token + o_head * stride_q_head
    m_q = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(p_row[:, None] + o_d[None, :], mask=m_q, other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    return b_q


@triton.jit
def store_result(
    p_out,  # [T, H, D]
    o_row_head,  # i64 [BLOCK_M], token * H + head
    m_row,  # [BLOCK_M]
    b_sum,
    b_acc,
    p_v_scale,
    i_kv_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
):
    """acc / l, by the scale of V; 0 where nothing was seen (a row without context)."""
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    if SCALED:
        b_out *= tl.load(p_v_scale + i_kv_head)
    o_d = tl.arange(0, BLOCK_D)
    p_row = p_out + o_row_head[:, None] * HEAD_DIM + o_d[None, :]
    m_md = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_md)
