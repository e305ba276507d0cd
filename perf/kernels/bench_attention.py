"""Paged attention: decode batches at the speed of memory, prefill at the speed of the matrix units.

Bytes of R rows with contexts C_r and T query tokens, values of e bytes:

    2 sum(C_r) G D e    keys and values, once per KV head whatever the number of query heads
    2 T H D e           queries read, results written

(e of the cache is 1 in fp8). With a window only the last w of a context count. Operations: 4 H D
for each visible pair of a query and a key (two products). Decode has a share of the copy bandwidth
as its goal, prefill a share of the dense bf16 matmul rate. Peers are in attention_peers.py.

A mixed batch is bound by both: decodes wait for memory while a prefill chunk multiplies. Its bytes
are those of all rows. Its goal is the share that remains where decodes at 0.85 and the chunk at
0.60 of their ceilings (taken as 4.3 TB/s and 700 TFLOP/s) run one after the other, in two launches:
a peer of the one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from millrace.kernels.dispatch import Operations, operations
from millrace.perf.kernels.attention_peers import flashinfer, torch_sdpa, xformers_splitk
from millrace.perf.kernels.case import OURS, Call, Case, Prepare, Provider, close_in_bf16
from millrace.perf.kernels.paged import Layout, PagedInputs, kv_bytes, paged_inputs
from millrace.perf.kernels.providers import ours
from millrace.perf.kernels.session import Session

LLAMA_8B = Layout(32, 8, 128)
LAYOUTS = {"D64": Layout(32, 8, 64), "D256": Layout(16, 8, 256), "D96": Layout(32, 32, 96)}
FP8 = Layout(32, 8, 128, fp8_cache=True)
WINDOWED = Layout(16, 8, 256, window=4096, softcap=50.0)  # Gemma 2 9B
DRY, DRY_FP8 = Layout(4, 2, 16), Layout(4, 2, 16, fp8_cache=True)

BATCHES = (1, 8, 32, 128, 256)
CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 17)
MOST_TOKENS = 1 << 23  # of a case; 34 GB of Llama 8B's keys and values
PREFILLS = (4096, 8192, 16384)
RAGGED = (131072, *(1024 + 37 * i for i in range(63)))  # one huge row among small ones
MIXED = ((4096,) * 65, (*(1,) * 64, 2048))  # contexts and queries: 64 decodes, half a prompt
DECODE_GOAL, PREFILL_GOAL, MIXED_GOAL = 0.85, 0.60, 0.47
SMALL, SMALL_RAGGED = (333, 333, 333), (1, 63, 64, 65, 300, 513)  # of the checks
SMALL_PREFILL = 333
SMALL_MIXED, DRY_MIXED = ((333, 300, 333), (1, 1, 70)), ((37, 3, 20), (1, 1, 5))


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    """Those with a goal first, so that a cut costs the others."""
    if dry_run:
        yield _prefill(device, DRY, 5, small=5)
        yield _decode(device, DRY, "b2 c37", (37, 37), small=(37, 37))
        yield _decode(device, DRY, "ragged", (37, 3), small=(37, 3))
        yield _decode(device, DRY_FP8, "fp8", (37, 3), small=(37, 3))
        yield _mixed(device, DRY, *DRY_MIXED, small=DRY_MIXED)
        return
    for context in PREFILLS:
        yield _prefill(device, LLAMA_8B, context, SMALL_PREFILL)
    yield _mixed(device, LLAMA_8B, *MIXED, SMALL_MIXED)
    for context in CONTEXTS:
        for batch in BATCHES:
            if batch * context <= MOST_TOKENS:
                name = f"b{batch} c{context}"
                yield _decode(device, LLAMA_8B, name, (context,) * batch, SMALL)
    for batch, context in ((32, 4096), (128, 4096), (32, 65536)):
        name = f"fp8 b{batch} c{context}"
        yield _decode(device, FP8, name, (context,) * batch, SMALL)
    for name, layout in LAYOUTS.items():
        yield _decode(device, layout, f"{name} b32 c4096", (4096,) * 32, SMALL)
    yield _decode(device, WINDOWED, "window 4096 softcap b32 c16384", (16384,) * 32, SMALL)
    yield _decode(device, LLAMA_8B, "ragged, one of 131072 in 64", RAGGED, SMALL_RAGGED)


def _decode(
    device: torch.device, layout: Layout, name: str, contexts: Sequence[int], small: Sequence[int]
) -> Case:
    seen = [min(context, layout.window or context) for context in contexts]
    io_bytes = 2 * len(contexts) * layout.heads * layout.head_dim * layout.dtype.itemsize
    return Case(
        kernel="paged_attention",
        name=f"decode {name}",
        bytes=kv_bytes(layout, seen) + io_bytes,
        flops=4 * layout.heads * layout.head_dim * sum(seen),
        bound="memory",
        goal=DECODE_GOAL,
        make=partial(paged_inputs, layout, contexts, (1,) * len(contexts), device),
        make_small=partial(paged_inputs, layout, small, (1,) * len(small), device),
        reference=_bind(operations(device, "reference")),
        providers={
            OURS: ours(device, "paged_attention", _bind),
            "torch SDPA": torch_sdpa(device, layout, contexts),
            "xformers triton_splitk": xformers_splitk(device, layout),
            "FlashInfer": flashinfer(device, layout),
        },
        check=close_in_bf16(device),
        axes={"batch": len(contexts), "context": max(contexts)},
    )


def _prefill(device: torch.device, layout: Layout, context: int, small: int) -> Case:
    pairs = context * (context + 1) // 2
    io_bytes = 2 * context * layout.heads * layout.head_dim * layout.dtype.itemsize
    return Case(
        kernel="paged_attention",
        name=f"prefill c{context}",
        bytes=kv_bytes(layout, [context]) + io_bytes,
        flops=4 * layout.heads * layout.head_dim * pairs,
        bound="matmul",
        goal=PREFILL_GOAL,
        make=partial(paged_inputs, layout, (context,), (context,), device),
        make_small=partial(paged_inputs, layout, (small,), (small,), device),
        reference=_bind(operations(device, "reference")),
        providers={
            OURS: ours(device, "paged_attention", _bind),
            "torch SDPA": torch_sdpa(device, layout, [context]),
            "FlashInfer": flashinfer(device, layout),
        },
        check=close_in_bf16(device),
        axes={"context": context},
    )


def _mixed(
    device: torch.device,
    layout: Layout,
    contexts: Sequence[int],
    queries: Sequence[int],
    small: tuple[Sequence[int], Sequence[int]],
) -> Case:
    """Decodes, and one chunk behind the tokens that its context has before it."""
    seen = zip(contexts, queries, strict=True)
    pairs = sum(asked * context - asked * (asked - 1) // 2 for context, asked in seen)
    io_bytes = 2 * sum(queries) * layout.heads * layout.head_dim * layout.dtype.itemsize
    one_launch = _bind(operations(device, "triton"))
    return Case(
        kernel="paged_attention",
        name=f"mixed b{len(contexts) - 1} c{contexts[0]}, chunk of {queries[-1]}",
        bytes=kv_bytes(layout, contexts) + io_bytes,
        flops=4 * layout.heads * layout.head_dim * pairs,
        bound="memory",
        goal=MIXED_GOAL,
        make=partial(paged_inputs, layout, contexts, queries, device),
        make_small=partial(paged_inputs, layout, *small, device),
        reference=_bind(operations(device, "reference")),
        providers={
            OURS: ours(device, "paged_attention", _bind),
            "two launches": Provider(partial(_apart, one_launch)),
            "FlashInfer": flashinfer(device, layout),
        },
        check=close_in_bf16(device),
        axes={"batch": len(contexts), "chunk": queries[-1]},
    )


def _apart(bind: Prepare, x: PagedInputs) -> Call:
    """The same kernels on the decodes, then on the chunk: what a step without mixing does."""
    decodes, whole = len(x.contexts) - 1, x.batch
    first = replace(
        whole,
        slots=whole.slots[:decodes],
        query_start=whole.query_start[: decodes + 1],
        context_lens=whole.context_lens[:decodes],
    )
    last = replace(
        whole,
        slots=whole.slots[decodes:],
        query_start=whole.query_start[decodes:] - decodes,
        context_lens=whole.context_lens[decodes:],
        num_decodes=0,
    )
    calls = [
        bind(replace(x, q=x.q[:decodes], batch=first)),
        bind(replace(x, q=x.q[decodes:], batch=last)),
    ]
    return lambda: (torch.cat([call()[0] for call in calls]),)


def _bind(table: Operations) -> Prepare:
    def prepare(x: PagedInputs) -> Call:
        layout = x.layout
        prepared = table.prepare_attention(x.batch, layout.block_size, layout.window)
        return lambda: (
            table.paged_attention(
                *(x.q, x.k_cache, x.v_cache, prepared),
                scale=layout.scale,
                softcap=layout.softcap,
                kv_scales=x.kv_scales,
            ),
        )

    return prepare
