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
37 % 16 = 5: write_index = 4 * 16 + 5 = 69.
"""

import torch
from torch import Tensor

from millrace.kernels.checks import expect, expect_contiguous
from millrace.kernels.norm import rms_norm, rms_norm_reference
from millrace.kernels.rope import RopeScaling, rope_table

__all__ = ["RopeScaling", "kv_append", "kv_append_reference", "rope_table"]


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
) -> Tensor:
    """Rotate q and k, append k and v to the cache, return q [T, H, D] (possibly a strided view).

    qkv            [T, (H + 2G) * D]  heads of q, then k, then v
    positions      i64 [T]            absolute position of each token, the row of cos_sin it uses
    write_index    i64 [T]            cache row of each token: block * P + offset; no row twice
    cos_sin        f32 [max_position, D]  D/2 cosines, then D/2 sines (`rope_table`)
    k_cache, v_cache  [B, P, G, D]    written in place, dtype of qkv
    q_norm_weight, k_norm_weight  [D] each, or both None; eps belongs to them

    ValueError names the argument whose shape or dtype does not fit.
    """
    head_dim, num_kv_heads = k_cache.shape[-1], k_cache.shape[-2]
    num_rotated = num_heads + num_kv_heads
    _validate(qkv, positions, write_index, cos_sin, k_cache, v_cache, num_heads)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight, k_norm_weight: expected both or neither, got one")
    qkv = qkv.view(qkv.shape[0], num_rotated + num_kv_heads, head_dim)
    q_and_k = qkv[:, :num_rotated]
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rms_norm(q_and_k[:, :num_heads], q_norm_weight, eps)
        k = rms_norm(q_and_k[:, num_heads:], k_norm_weight, eps)
        q_and_k = torch.cat((q, k), dim=1)
    rotated = _rotate(q_and_k, cos_sin.index_select(0, positions))
    row_shape = (-1, num_kv_heads, head_dim)
    k_cache.view(row_shape).index_copy_(0, write_index, rotated[:, num_heads:])
    v_cache.view(row_shape).index_copy_(0, write_index, qkv[:, num_rotated:])
    return rotated[:, :num_heads]


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
) -> Tensor:
    """The definition: `kv_append`, one token after the other."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    half = head_dim // 2
    queries = torch.empty(qkv.shape[0], num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    for t in range(qkv.shape[0]):
        heads = qkv[t].view(-1, head_dim)
        q, k, v = heads.tensor_split((num_heads, num_heads + num_kv_heads))
        if q_norm_weight is not None and k_norm_weight is not None:
            q = rms_norm_reference(q, q_norm_weight, eps)
            k = rms_norm_reference(k, k_norm_weight, eps)
        cos, sin = cos_sin[positions[t], :half], cos_sin[positions[t], half:]
        block, offset = divmod(int(write_index[t]), block_size)
        for x, destination in ((q, queries[t]), (k, k_cache[block, offset])):
            x1, x2 = x[:, :half].float(), x[:, half:].float()
            rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=1)
            destination.copy_(rotated.to(qkv.dtype))
        v_cache[block, offset] = v
    return queries


def _validate(
    qkv: Tensor,
    positions: Tensor,
    write_index: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
) -> None:
    expect("k_cache", k_cache, (None, None, None, None))
    expect("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype)
    expect_contiguous("k_cache", k_cache)
    expect_contiguous("v_cache", v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    if head_dim % 2:
        raise ValueError(f"k_cache: expected an even head dimension, got {head_dim}")
    num_tokens = qkv.shape[0]
    expect("qkv", qkv, (None, (num_heads + 2 * num_kv_heads) * head_dim), k_cache.dtype)
    expect("positions", positions, (num_tokens,), torch.int64)
    expect("write_index", write_index, (num_tokens,), torch.int64)
    expect("cos_sin", cos_sin, (None, head_dim), torch.float32)
