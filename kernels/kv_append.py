"""From the fused QKV projection to a rotated query and two cache rows, in one pass.

For each token t at absolute position p: split qkv into q [H, D], k [G, D], v [G, D]; RMSNorm each
head of q and k where the model has such weights (Qwen3); rotate q and k; write k and v into row
`write_index[t]` of the cache; return q.

Rotation (RoPE, Su et al. 2021, in the rotate-half layout of GPT-NeoX and Llama): with c, s the
cosine and sine of p * frequency[i] and x1, x2 the halves of a head,

    y1 = x1 * c - x2 * s          y2 = x2 * c + x1 * s

computed in float32 and rounded once. `kernels/rope.py` makes the table of c and s.

Cache rows: token offset o of block b is row b * P + o of K and V [B, P, G, D]. With P = 16, the
token at position 37 of a sequence whose blocks are (5, 9, 4) lies in its third block at offset
37 % 16 = 5: write_index = 4 * 16 + 5 = 69. A token with a negative write_index is padding: it
writes no row. Its position must still be one of the table, and its query is like any other's.

A cache of float8 e4m3 holds, of what a cache of qkv's dtype would hold, for KV head g

    round(clamp(x * (1 / scale[g]), -448, 448))

in float32, to the nearest e4m3 number (ties to even), and whoever reads it multiplies by scale[g].
`kv_append_triton.py` does all of this in one launch.
"""

import torch
from torch import Tensor

from millrace.kernels.attention import KVScales
from millrace.kernels.checks import FLOATING_DTYPES, expect, expect_contiguous
from millrace.kernels.norm import rms_norm, rms_norm_reference
from millrace.kernels.rope import RopeScaling, rope_table

__all__ = ["RopeScaling", "kv_append", "kv_append_reference", "rope_table"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


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
    """Rotate q and k, append k and v to the cache, return q [T, H, D] (possibly a strided view).

    qkv            [T, (H + 2G) * D]  heads of q, then k, then v
    positions      i64 [T]            absolute position of each token, the row of cos_sin it uses
    write_index    i64 [T]            cache row of each token: block * P + offset; no row twice,
                                      and negative for padding, which writes nothing
    cos_sin        f32 [max_position, D]  D/2 cosines, then D/2 sines (`rope_table`)
    k_cache, v_cache  [B, P, G, D]    written in place; dtype of qkv, or float8_e4m3fn
    q_norm_weight, k_norm_weight  [D] each, or both None; eps belongs to them
    kv_scales      f32 [G] each       of a float8 cache, else None

    ValueError names the argument whose shape or dtype does not fit.
    """
    head_dim, num_kv_heads = k_cache.shape[-1], k_cache.shape[-2]
    num_rotated = num_heads + num_kv_heads
    expect_append_inputs(qkv, positions, write_index, cos_sin, k_cache, v_cache, num_heads)
    expect_norms_and_scales(q_norm_weight, k_norm_weight, kv_scales, qkv.dtype, k_cache)
    qkv = qkv.view(qkv.shape[0], num_rotated + num_kv_heads, head_dim)
    q_and_k = qkv[:, :num_rotated]
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rms_norm(q_and_k[:, :num_heads], q_norm_weight, eps)
        k = rms_norm(q_and_k[:, num_heads:], k_norm_weight, eps)
        q_and_k = torch.cat((q, k), dim=1)
    rotated = _rotate(q_and_k, cos_sin.index_select(0, positions))
    keys, values = rotated[:, num_heads:], qkv[:, num_rotated:]
    if kv_scales is not None:
        keys, values = to_fp8(keys, kv_scales.key), to_fp8(values, kv_scales.value)
    _write_rows(k_cache, write_index, keys)
    _write_rows(v_cache, write_index, values)
    return rotated[:, :num_heads]


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., G, D] as an e4m3 cache stores it, scale f32 [G]; what is beyond 448 saturates."""
    scaled = x.float() * (1.0 / scale).unsqueeze(-1)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _write_rows(cache: Tensor, write_index: Tensor, rows: Tensor) -> None:
    """Row t of rows [T, G, D] to row write_index[t] of the cache, padding left out.

    A negative index is an error to PyTorch. On a CPU it is caught, so that batches without padding
    are not searched for it. On a GPU it would end the process's context, and looking for it would
    make the host wait: there padding does again what some other token does.
    """
    if cache.dtype == FP8:  # which index_copy_ does not know
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache_rows = cache.flatten(0, 1)
    if cache.device.type != "cpu":
        _write_rows_without_waiting(cache_rows, write_index, rows)
        return
    try:
        cache_rows.index_copy_(0, write_index, rows)
    except IndexError:
        written = write_index >= 0
        cache_rows.index_copy_(0, write_index[written], rows[written])


def _write_rows_without_waiting(cache_rows: Tensor, write_index: Tensor, rows: Tensor) -> None:
    """As `_write_rows`, with nothing that depends on whether there is padding.

    The token with the greatest index is written by all padding as well: the same values to the same
    place. Where all is padding, row 0 of the cache is written with what it holds.
    """
    if len(rows) == 0:
        return
    real = write_index >= 0
    last = write_index.argmax(0, keepdim=True)  # [1]; a tensor of no dimension would be fetched
    index = torch.where(real, write_index, write_index[last].clamp(min=0))
    source = torch.where(real[last][:, None, None], rows[last], cache_rows[:1])
    rows = torch.where(real[:, None, None], rows, source)
    cache_rows.index_copy_(0, index, rows)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """RoPE of x [T, heads, D] by cos_sin [T, D]; three passes over x, whatever the dtype."""
    num_tokens, heads, head_dim = x.shape
    cos, sin = cos_sin.view(num_tokens, 1, 2, head_dim // 2).unbind(2)
    x32 = x.float().view(num_tokens, heads, 2, head_dim // 2)
    first, second = x32.unbind(2)
    y = x32 * cos.unsqueeze(2)
    y_first, y_second = y.unbind(2)
    y_first.addcmul_(second, sin, value=-1)
    y_second.addcmul_(first, sin)
    return y.view(num_tokens, heads, head_dim).to(x.dtype)


def kv_append_reference(
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
    """The definition: `kv_append`, one token after the other."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    queries = torch.empty(qkv.shape[0], num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    for t in range(qkv.shape[0]):
        heads = qkv[t].view(-1, head_dim)
        q, k, v = heads.tensor_split((num_heads, num_heads + num_kv_heads))
        if q_norm_weight is not None and k_norm_weight is not None:
            q = rms_norm_reference(q, q_norm_weight, eps)
            k = rms_norm_reference(k, k_norm_weight, eps)
        queries[t] = _rotate_reference(q, cos_sin[positions[t]])
        k = _rotate_reference(k, cos_sin[positions[t]])
        if kv_scales is not None:
            k, v = to_fp8(k, kv_scales.key), to_fp8(v, kv_scales.value)
        if write_index[t] >= 0:
            block, offset = divmod(int(write_index[t]), block_size)
            k_cache[block, offset] = k
            v_cache[block, offset] = v
    return queries


def _rotate_reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    """RoPE of x [heads, D] by cos_sin [D]."""
    cos, sin = cos_sin.chunk(2)
    x1, x2 = x.float().chunk(2, dim=1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=1).to(x.dtype)


def expect_append_inputs(
    qkv: Tensor,
    positions: Tensor,
    write_index: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
) -> None:
    """ValueError names the tensor whose shape or dtype does not fit the others."""
    cache_dtypes = (qkv.dtype, FP8) if qkv.dtype in FLOATING_DTYPES else FLOATING_DTYPES
    expect("k_cache", k_cache, (None, None, None, None), cache_dtypes)
    expect("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype)
    expect_contiguous("k_cache", k_cache)
    expect_contiguous("v_cache", v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    if head_dim % 2:
        raise ValueError(f"k_cache: expected an even head dimension, got {head_dim}")
    num_tokens = qkv.shape[0]
    expect("qkv", qkv, (None, (num_heads + 2 * num_kv_heads) * head_dim))
    expect("positions", positions, (num_tokens,), torch.int64)
    expect("write_index", write_index, (num_tokens,), torch.int64)
    expect("cos_sin", cos_sin, (None, head_dim), torch.float32)


def expect_norms_and_scales(
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    kv_scales: KVScales | None,
    dtype: torch.dtype,
    k_cache: Tensor,
) -> None:
    """ValueError names the optional argument that does not fit qkv's dtype or the cache."""
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight, k_norm_weight: expected both or neither, got one")
    num_kv_heads, head_dim = k_cache.shape[2:]
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            expect(name, weight, (head_dim,), dtype)
    if (kv_scales is not None) != (k_cache.dtype == FP8):
        raise ValueError("kv_scales: expected with a float8_e4m3fn cache, and only then")
    if kv_scales is not None:
        expect("kv_scales.key", kv_scales.key, (num_kv_heads,), torch.float32)
        expect("kv_scales.value", kv_scales.value, (num_kv_heads,), torch.float32)
