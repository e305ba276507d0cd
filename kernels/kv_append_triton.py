"""QKV to a rotated query and two cache rows on a GPU, in one launch; `kv_append.py` defines it.

A token's programs share out its heads: each of the first ones normalises, rotates and stores Q_TILE
heads of q; each of the others takes KV_TILE heads of k, and the same of v, to the token's cache
row. So qkv is read once and all else is written once, and there is no second pass over the cache.
The halves of a head are two tiles of D / 2 columns, padded to a power of two: a rotation mixes
column i of both, and head dimensions such as 80 and 96 need nothing else.

In float32, rounded where the reference rounds. Sums are taken by halves and products that meet a
sum are explicit `fma`, so a head has the same bits in any tile: whatever other tokens there are,
and in `append_attention_triton.py`, which does the same for decodes in the kernel of attention. A
token with a negative write_index gets its query, and writes no row; a graph may replay with such
rows.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.attention import KVScales
from millrace.kernels.configs import LaunchConfig, launch_config
from millrace.kernels.fp8_triton import encode_e4m3
from millrace.kernels.kv_append import FP8, expect_append_inputs, expect_norms_and_scales
from millrace.kernels.matmul_tile_triton import ordered_sum

TILE = 1024  # elements of each half of a program's heads
NUM_WARPS = 2  # so that each thread has four 16-byte loads of 16-bit elements under way


@triton.jit
def rotated(
    b_x1,  # [HEADS, BLOCK_HALF], first halves of heads
    b_x2,  # [HEADS, BLOCK_HALF], second halves
    p_norm,  # [D], with NORM
    p_angles,  # f32 [D], the token's row of cos_sin
    eps,
    o_half,
    m_half,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """RMSNorm with NORM, then RoPE: both halves, of the dtype of b_x1."""
    dtype = b_x1.dtype
    b_x1, b_x2 = b_x1.to(tl.float32), b_x2.to(tl.float32)
    if NORM:
        b_squares = tl.fma(b_x1, b_x1, b_x2 * b_x2)
        b_squares = ordered_sum(b_squares, b_x1.shape[0], b_x1.shape[1])
        b_scale = tl.rsqrt(b_squares / (2 * HALF) + eps)[:, None]
        b_w1 = tl.load(p_norm + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        b_w2 = tl.load(p_norm + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)[None, :]
        b_x1 = ((b_x1 * b_scale).to(dtype).to(tl.float32) * b_w1).to(dtype).to(tl.float32)
        b_x2 = ((b_x2 * b_scale).to(dtype).to(tl.float32) * b_w2).to(dtype).to(tl.float32)
    b_cos = tl.load(p_angles + o_half, mask=m_half, other=0.0)[None, :]
    b_sin = tl.load(p_angles + HALF + o_half, mask=m_half, other=0.0)[None, :]
    b_y1, b_y2 = tl.fma(b_x1, b_cos, -(b_x2 * b_sin)), tl.fma(b_x2, b_cos, b_x1 * b_sin)
    return b_y1.to(dtype), b_y2.to(dtype)


@triton.jit
def store_cache(p_cache, b_x, p_scale, o_head, m_head, m_x, FP8: tl.constexpr):
    """b_x [HEADS, BLOCK_HALF] to the cache, divided by its head's scale and as e4m3 with FP8."""
    if FP8:
        b_scale = tl.load(p_scale + o_head, mask=m_head, other=1.0)
        b_inverse = tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), b_scale)
        b_x = encode_e4m3(b_x.to(tl.float32) * b_inverse[:, None])
    tl.store(p_cache, b_x, mask=m_x)


@triton.jit
def kv_append_kernel(
    p_qkv,  # [T, (H + 2G) * D]
    p_positions,  # i64 [T]
    p_write_index,  # i64 [T]
    p_cos_sin,  # f32 [max_position, D]
    p_q,  # [T, H, D]
    p_k_cache,  # [B * P, G, D], bytes with FP8
    p_v_cache,  # [B * P, G, D], likewise
    p_q_norm,  # [D], with NORM
    p_k_norm,  # [D], with NORM
    p_k_scale,  # f32 [G], with FP8
    p_v_scale,  # f32 [G], with FP8
    stride_qkv,
    stride_cos_sin,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    BLOCK_HALF: tl.constexpr,
    Q_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
):
    q_parts = tl.cdiv(NUM_HEADS, Q_TILE)
    parts = q_parts + tl.cdiv(NUM_KV_HEADS, KV_TILE)
    i_token = (tl.program_id(0) // parts).to(tl.int64)
    i_part = tl.program_id(0) % parts
    o_half = tl.arange(0, BLOCK_HALF)
    m_half = o_half < HALF
    p_token = p_qkv + i_token * stride_qkv
    p_angles = p_cos_sin + tl.load(p_positions + i_token) * stride_cos_sin

    if i_part < q_parts:
        o_head = i_part * Q_TILE + tl.arange(0, Q_TILE)
        m_x = (o_head < NUM_HEADS)[:, None] & m_half[None, :]
        o_x = o_head[:, None] * (2 * HALF) + o_half[None, :]  # [Q_TILE, BLOCK_HALF]
        b_q1 = tl.load(p_token + o_x, mask=m_x, other=0.0)
        b_q2 = tl.load(p_token + o_x + HALF, mask=m_x, other=0.0)
        b_q1, b_q2 = rotated(b_q1, b_q2, p_q_norm, p_angles, eps, o_half, m_half, HALF, NORM)
        p_out = p_q + i_token * (NUM_HEADS * 2 * HALF) + o_x
        tl.store(p_out, b_q1, mask=m_x)
        tl.store(p_out + HALF, b_q2, mask=m_x)
        return

    i_row = tl.load(p_write_index + i_token)
    if i_row < 0:  # padding
        return
    o_head = (i_part - q_parts) * KV_TILE + tl.arange(0, KV_TILE)
    m_head = o_head < NUM_KV_HEADS
    m_x = m_head[:, None] & m_half[None, :]
    o_x = o_head[:, None] * (2 * HALF) + o_half[None, :]  # [KV_TILE, BLOCK_HALF]
    p_k = p_token + NUM_HEADS * (2 * HALF) + o_x
    p_v = p_k + NUM_KV_HEADS * (2 * HALF)
    b_k1 = tl.load(p_k, mask=m_x, other=0.0)
    b_k2 = tl.load(p_k + HALF, mask=m_x, other=0.0)
    b_v1 = tl.load(p_v, mask=m_x, other=0.0)
    b_v2 = tl.load(p_v + HALF, mask=m_x, other=0.0)
    b_k1, b_k2 = rotated(b_k1, b_k2, p_k_norm, p_angles, eps, o_half, m_half, HALF, NORM)
    o_cache = i_row * (NUM_KV_HEADS * 2 * HALF) + o_x
    store_cache(p_k_cache + o_cache, b_k1, p_k_scale, o_head, m_head, m_x, FP8)
    store_cache(p_k_cache + o_cache + HALF, b_k2, p_k_scale, o_head, m_head, m_x, FP8)
    store_cache(p_v_cache + o_cache, b_v1, p_v_scale, o_head, m_head, m_x, FP8)
    store_cache(p_v_cache + o_cache + HALF, b_v2, p_v_scale, o_head, m_head, m_x, FP8)


@cache
def append_config(head_dim: int, device: torch.device) -> LaunchConfig:
    """How heads of `head_dim` are launched: heads of q, and of k and v, a program, and warps."""
    heads = max(1, TILE // triton.next_power_of_2(head_dim // 2))
    default = LaunchConfig(NUM_WARPS, 1, {"Q_TILE": heads, "KV_TILE": max(1, heads // 2)})
    return launch_config("kv_append", f"D{head_dim}", device, default)


def kv_append(
    qkv: Tensor,
    positions: Tensor,
    write_index: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`kv_append.kv_append`, with its arguments; rows of qkv and cos_sin may lie at any stride."""
    expect_append_inputs(qkv, positions, write_index, cos_sin, k_cache, v_cache, num_heads)
    expect_norms_and_scales(q_norm_weight, k_norm_weight, kv_scales, qkv.dtype, k_cache)
    for name, tensor in (("qkv", qkv), ("cos_sin", cos_sin)):
        if tensor.stride(1) != 1:
            raise ValueError(f"{name}: expected a last stride of 1, got {tensor.stride(1)}")
    num_tokens, (num_kv_heads, head_dim) = qkv.shape[0], k_cache.shape[2:]
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    fp8 = k_cache.dtype == FP8
    config = append_config(head_dim, qkv.device)
    q_tile = min(config.constants["Q_TILE"], triton.next_power_of_2(num_heads))
    kv_tile = min(config.constants["KV_TILE"], triton.next_power_of_2(num_kv_heads))
    parts = triton.cdiv(num_heads, q_tile) + triton.cdiv(num_kv_heads, kv_tile)
    kv_append_kernel[(num_tokens * parts,)](
        qkv,
        positions,
        write_index,
        cos_sin,
        q,
        k_cache.view(torch.uint8) if fp8 else k_cache,
        v_cache.view(torch.uint8) if fp8 else v_cache,
        q_norm_weight,
        k_norm_weight,
        None if kv_scales is None else kv_scales.key,
        None if kv_scales is None else kv_scales.value,
        qkv.stride(0),
        cos_sin.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        Q_TILE=q_tile,
        KV_TILE=kv_tile,
        NORM=q_norm_weight is not None,
        FP8=fp8,
        **config.options,
    )
    return q
