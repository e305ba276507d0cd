"""From the fused QKV to a rotated query and two cache rows, at 8k tokens of a prefill step.

Bytes of T tokens, values of e bytes, H query and G KV heads of D:
    T (H + 2 G) D e     qkv read
    T H D e             q written
    2 T G D e           k and v written to the cache (e of it is 1 in fp8)
    4 T D + 16 T        a row of cosines and sines; position and cache row, int64
The norms of q and k (Qwen3) add 2 D e.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from millrace.kernels.attention import KVScales
from millrace.kernels.dispatch import Operations, operations
from millrace.kernels.rope import rope_table
from millrace.perf.kernels.case import Absent, Call, Case, Outputs, Prepare, Provider, close_in_bf16
from millrace.perf.kernels.paged import kv_scales
from millrace.perf.kernels.providers import NAIVE, tables
from millrace.perf.kernels.session import Session

BLOCK_SIZE = 16
DTYPE = torch.bfloat16
THETA = 500_000.0
EPS = 1e-6
GOAL = 0.8
FLOPS_PER_VALUE = 6
SPARE_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    normed: bool = False
    fp8: bool = False

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else DTYPE


SHAPES = (
    Shape("Llama 1B", 32, 8, 64),
    Shape("Llama 8B", 32, 8, 128),
    Shape("Qwen3 8B", 32, 8, 128, normed=True),
    Shape("Llama 8B, fp8", 32, 8, 128, fp8=True),
)
TOKENS, SMALL_TOKENS = 8192, 65
DRY_SHAPES = (
    Shape("tiny", 2, 1, 16),
    Shape("tiny, normed", 2, 1, 16, normed=True),
    Shape("tiny, fp8", 2, 1, 16, fp8=True),
)
DRY_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Inputs:
    qkv: Tensor
    positions: Tensor
    write_index: Tensor
    cos_sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    heads: int
    norms: tuple[Tensor, Tensor] | None
    kv_scales: KVScales | None


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    tokens, small = (DRY_TOKENS, DRY_TOKENS) if dry_run else (TOKENS, SMALL_TOKENS)
    for shape in DRY_SHAPES if dry_run else SHAPES:
        values = tokens * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        cache_values = tokens * shape.head_dim * 2 * shape.kv_heads
        cache_bytes = cache_values * shape.cache_dtype.itemsize
        tables_bytes = tokens * (4 * shape.head_dim + 16)
        norms_bytes = 2 * shape.head_dim * DTYPE.itemsize if shape.normed else 0
        yield Case(
            kernel="kv_append",
            name=f"{shape.name}, {tokens} tokens bf16",
            bytes=values * DTYPE.itemsize + cache_bytes + tables_bytes + norms_bytes,
            flops=FLOPS_PER_VALUE * tokens * shape.head_dim * (shape.heads + shape.kv_heads),
            bound="memory",
            goal=GOAL,
            make=partial(_inputs, shape, tokens, device),
            make_small=partial(_inputs, shape, small, device),
            reference=_bind(operations(device, "reference")),
            providers=_providers(device),
            check=close_in_bf16(device),
            axes={"tokens": tokens, "head_dim": shape.head_dim},
        )


def _providers(device: torch.device) -> dict[str, Provider | Absent]:
    """Without the definition: it goes token by token."""
    found = tables(device, "kv_append", _bind)
    return {name: provider for name, provider in found.items() if name != NAIVE}


def _inputs(shape: Shape, tokens: int, device: torch.device, seed: int) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=DTYPE, device=device).normal_(generator=random)

    blocks = -(-tokens // BLOCK_SIZE) + SPARE_BLOCKS
    k_cache, v_cache = (
        torch.full((blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim), torch.nan, dtype=DTYPE)
        for _ in range(2)
    )
    order = torch.randperm(blocks, generator=random, device=device)
    offsets = torch.arange(BLOCK_SIZE, device=device)
    return Inputs(
        qkv=normal(tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
        positions=torch.arange(tokens, device=device),
        write_index=(order.unsqueeze(1) * BLOCK_SIZE + offsets).flatten()[:tokens].contiguous(),
        cos_sin=rope_table(shape.head_dim, tokens, THETA, device=device),
        k_cache=k_cache.to(device, shape.cache_dtype),
        v_cache=v_cache.to(device, shape.cache_dtype),
        heads=shape.heads,
        norms=(normal(shape.head_dim), normal(shape.head_dim)) if shape.normed else None,
        kv_scales=kv_scales(shape.kv_heads, device) if shape.fp8 else None,
    )


def _bind(table: Operations) -> Prepare:
    def prepare(x: Inputs) -> Call:
        weights = x.norms or (None, None)

        def call() -> Outputs:
            q = table.kv_append(
                *(x.qkv, x.positions, x.write_index, x.cos_sin, x.k_cache, x.v_cache, x.heads),
                *weights,
                eps=EPS,
                kv_scales=x.kv_scales,
            )
            return q, x.k_cache, x.v_cache

        return call

    return prepare
