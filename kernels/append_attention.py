"""kv_append and the attention of decodes in one: from the fused QKV projection to attended values.

    q = kv_append(qkv, ...)           `kv_append.py`: rotate q and k, write k and v to the cache
    out = paged_attention(q, ...)     `attention.py`

for a batch of decodes alone: row i is token i. A decode's attention reads its own token's key and
value, which it may as well write itself: one launch less in each layer of a decode step. No soft
cap, no fp8 cache: no model of ours has the first, and the second is not written by decodes alone.
`append_attention_triton.py` is the fast form, bit for bit the two kernels that it replaces.
"""

from torch import Tensor

from millrace.kernels.attention import PreparedAttention, paged_attention_reference
from millrace.kernels.kv_append import kv_append_reference


def append_attention_reference(
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
    """The definition; the arguments of `kv_append`, then those of `paged_attention`."""
    q = kv_append_reference(
        *(qkv, positions, write_index, cos_sin, k_cache, v_cache, num_heads),
        *(q_norm_weight, k_norm_weight, eps),
    )
    return paged_attention_reference(q, k_cache, v_cache, prepared, scale=scale)
