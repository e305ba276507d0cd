"""kv_append and the attention of decodes in one launch, as compiled: the bits of the two apart."""

from dataclasses import fields, replace

import pytest
import torch

from millrace.kernels.append_attention_triton import append_attention
from millrace.kernels.attention_triton import SPLIT, paged_attention
from millrace.kernels.kv_append_triton import kv_append

SCALE = 0.125
CONTEXTS = [1, SPLIT, SPLIT + 1, 17, 3000]


def to_gpu(arguments):
    """Copies of the tensors on the device, those of the batch too."""
    *tensors, prepared = arguments
    batch = {f.name: getattr(prepared.batch, f.name) for f in fields(prepared.batch)}
    moved = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in batch.items()}
    prepared = replace(prepared, batch=replace(prepared.batch, **moved))
    return (*(t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors), prepared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(8, 2, 128, None), (6, 2, 64, None), (5, 1, 80, 40), (4, 4, 96, None), (2, 1, 256, None)],
    ids=str,
)
def test_the_bits_are_those_of_two_launches(
    decode_case, heads, kv_heads, head_dim, window, norm, dtype
):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    arguments = decode_case(CONTEXTS, norm=norm, window=window, **shape)
    together, apart = to_gpu(arguments), to_gpu(arguments)
    out = append_attention(*together, scale=SCALE)
    *appended, prepared = apart
    q = kv_append(*appended)
    assert torch.equal(out, paged_attention(q, *appended[4:6], prepared, scale=SCALE))
    for cache, other in zip(together[4:6], apart[4:6], strict=True):
        torch.testing.assert_close(cache, other, rtol=0, atol=0, equal_nan=True)
