"""Other people's attention, on the very batches of bench_attention.py.

torch's SDPA cannot walk a block table: it is given keys and values gathered into one tensor
beforehand, and the gather, which a paged cache would need in every layer, is not timed. What cannot
run a batch says so: SDPA takes rows of one length only, xformers' kernel head dimensions that are
powers of two. None of them is told a window or a soft cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.attention import gather_context
from millrace.perf.kernels.case import Absent, Call, Outputs, Provider
from millrace.perf.kernels.paged import GROUP_TOKENS, Layout, PagedInputs, kv_bytes
from millrace.perf.kernels.providers import ON_CPU

WORKSPACE_BYTES = 256 << 20  # twice what FlashInfer's documentation allots


def torch_sdpa(device: torch.device, layout: Layout, contexts: Sequence[int]) -> Provider | Absent:
    """scaled_dot_product_attention, causal where each row asks for all of its tokens."""
    if absent := _not_plain(layout):
        return absent
    if len(set(contexts)) > 1:
        return Absent("rows of one length only")
    return Provider(_sdpa, extra_bytes=kv_bytes(layout, contexts))


def _sdpa(x: PagedInputs) -> Call:
    k, v = _gathered(x, x.k_cache), _gathered(x, x.v_cache)
    q = x.q.view(len(x.contexts), x.queries[0], *x.q.shape[1:]).transpose(1, 2)
    causal = x.queries[0] > 1

    def call() -> Outputs:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=x.layout.scale, enable_gqa=True
        )
        return (out.transpose(1, 2).flatten(0, 1),)

    return call


def _gathered(x: PagedInputs, cache: Tensor) -> Tensor:
    """[R, G, C, D], a view of [R, C, G, D]: a row at a time, for want of memory for two copies."""
    rows = len(x.contexts)
    dense = torch.empty(
        rows, x.contexts[0], *cache.shape[2:], dtype=cache.dtype, device=cache.device
    )
    for i_row, slot in enumerate(x.batch.slots.tolist()):
        dense[i_row] = gather_context(cache, x.batch.block_table[slot], x.contexts[0])
    return dense.transpose(1, 2)


def xformers_splitk(device: torch.device, layout: Layout) -> Provider | Absent:
    """xformers' Triton split-K decode with its paged bias; pages are groups of 64 tokens."""
    absent = _missing(device, layout, "xformers")
    if absent is None and layout.head_dim & (layout.head_dim - 1):
        absent = Absent("head dimensions that are powers of two only")
    return absent or Provider(_xformers)


def _xformers(x: PagedInputs) -> Call:
    fmha = import_module("xformers.ops.fmha")
    biases = import_module("xformers.ops.fmha.attn_bias")
    bias = biases.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=x.queries,
        kv_seqlen=x.contexts,
        block_tables=x.groups,
        page_size=GROUP_TOKENS,
        device=x.q.device,
    )
    layout = x.layout
    shape = (1, -1, layout.kv_heads, layout.heads // layout.kv_heads, layout.head_dim)
    k, v = (
        cache.view(1, -1, layout.kv_heads, 1, layout.head_dim).expand(shape)
        for cache in (x.k_cache, x.v_cache)
    )

    def call() -> Outputs:
        out = fmha.memory_efficient_attention_forward(
            x.q.view(shape), k, v, bias, scale=layout.scale, op=fmha.triton_splitk.FwOp
        )
        return (out.reshape(x.q.shape),)

    return call


def flashinfer(device: torch.device, layout: Layout) -> Provider | Absent:
    """FlashInfer's paged wrappers; the plan is made once, outside of what is timed."""
    return _missing(device, layout, "flashinfer") or Provider(_flashinfer)


def _flashinfer(x: PagedInputs) -> Call:
    library: Any = import_module("flashinfer")
    layout, device = x.layout, x.q.device
    blocks_of_row = [-(-context // layout.block_size) for context in x.contexts]
    ends = torch.tensor([0, *blocks_of_row]).cumsum(0).int().to(device)
    tables = x.batch.block_table[x.batch.slots]
    used = [table[:count] for table, count in zip(tables, blocks_of_row, strict=True)]
    last = [(context - 1) % layout.block_size + 1 for context in x.contexts]
    pages = (ends, torch.cat(used), torch.tensor(last, dtype=torch.int32, device=device))
    sizes = (layout.heads, layout.kv_heads, layout.head_dim, layout.block_size)
    dtypes = {"q_data_type": layout.dtype, "kv_data_type": layout.dtype}
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if max(x.queries) == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(*pages, *sizes, sm_scale=layout.scale, **dtypes)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        starts = x.batch.query_start
        wrapper.plan(starts, *pages, *sizes, causal=True, sm_scale=layout.scale, **dtypes)
    return lambda: (wrapper.run(x.q, (x.k_cache, x.v_cache)),)


def _not_plain(layout: Layout) -> Absent | None:
    if layout.window or layout.softcap or layout.fp8_cache:
        return Absent("called without a window, a soft cap and fp8 only")
    return None


def _missing(device: torch.device, layout: Layout, package: str) -> Absent | None:
    if device.type != "cuda":
        return ON_CPU
    if absent := _not_plain(layout):
        return absent
    return None if find_spec(package) else Absent(f"{package} is not installed")
