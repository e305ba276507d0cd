"""Cases that several test files share: a paged batch with the dense keys and values that it pages,
arguments of kv_append, and rows of logits of every kind with sampling parameters of every kind."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from millrace.kernels.attention import AttentionBatch, KVScales, prepare_attention
from millrace.kernels.rope import rope_table
from millrace.kernels.slot_sampling import SlotSampling, SlotValues

SPARE_SLOTS = 2
SPARE_BLOCKS = 3
APPEND_BLOCK_SIZE = 16
APPEND_POSITIONS = 200
GUARD = 64  # elements; a multiple of 16 bytes, so that pointers stay aligned


@dataclass
class AttentionCase:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    dense: list[tuple[Tensor, Tensor]]  # by row: keys and values [context, G, D]
    block_size: int
    kv_scales: KVScales | None = None

    def leave_window(self, window: int) -> None:
        """Put a block of NaNs in the place of those that lie wholly before each row's window."""
        table, starts = self.batch.block_table, self.batch.query_start.tolist()
        of_nans = next(i for i in range(len(self.k_cache)) if i not in table)
        for i_row, context in enumerate(self.batch.context_lens.tolist()):
            first = context - (starts[i_row + 1] - starts[i_row]) - window + 1
            table[self.batch.slots[i_row], : max(0, first) // self.block_size] = of_nans


@pytest.fixture
def attention_case():
    """make(contexts, queries, ...): sequences scattered over blocks, every unused byte a NaN.

    Without num_decodes, the rows before the first with several queries are decodes.
    """

    def make(
        contexts,
        queries=None,
        *,
        heads=6,
        kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float32,
        cache_dtype=None,
        num_decodes=None,
        seed=0,
    ):
        cache_dtype = cache_dtype or dtype
        random = torch.Generator().manual_seed(seed)
        queries = queries or [1] * len(contexts)
        blocks_of_row = [-(-context // block_size) for context in contexts]
        num_blocks = sum(blocks_of_row) + SPARE_BLOCKS
        shape = (num_blocks, block_size, kv_heads, head_dim)
        k_cache = torch.full(shape, float("nan")).to(cache_dtype)
        v_cache = torch.full(shape, float("nan")).to(cache_dtype)
        slots = torch.randperm(len(contexts) + SPARE_SLOTS, generator=random)[: len(contexts)]
        table = torch.full((len(contexts) + SPARE_SLOTS, max([1, *blocks_of_row])), -1)
        free = torch.randperm(num_blocks, generator=random)
        dense = []
        for slot, context, needed in zip(slots, contexts, blocks_of_row, strict=True):
            blocks, free = free[:needed], free[needed:]
            table[slot, :needed] = blocks
            pair = torch.randn(2, context, kv_heads, head_dim, generator=random).to(cache_dtype)
            for cache, tokens in zip((k_cache, v_cache), pair, strict=True):
                for position in range(context):
                    block = blocks[position // block_size]
                    cache[block, position % block_size] = tokens[position]
            dense.append((pair[0], pair[1]))
        if num_decodes is None:
            num_decodes = next((i for i, n in enumerate(queries) if n != 1), len(queries))
        batch = AttentionBatch(
            block_table=table.int(),
            slots=slots,
            query_start=torch.tensor([0, *queries]).cumsum(0).int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            max_query_len=max([0, *queries]),
            max_context_len=max([0, *contexts]),
            num_decodes=num_decodes,
        )
        q = torch.randn(sum(queries), heads, head_dim, generator=random).to(dtype)
        scales = None
        if cache_dtype == torch.float8_e4m3fn:
            scales = KVScales(*(torch.rand(2, kv_heads, generator=random) + 0.5))
        return AttentionCase(q, k_cache, v_cache, batch, dense, block_size, scales)

    return make


@pytest.fixture
def append_case():
    """make(tokens, heads, kv_heads, head_dim, dtype): arguments of kv_append, caches of NaN."""

    def make(num_tokens, heads, kv_heads, head_dim, dtype, *, norm=False, blocks=7):
        norms = [torch.rand(head_dim).to(dtype) + 0.5 if norm else None for _ in range(2)]
        shape = (blocks, APPEND_BLOCK_SIZE, kv_heads, head_dim)
        return {
            "qkv": torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim).to(dtype),
            "positions": torch.randint(0, APPEND_POSITIONS, (num_tokens,)),
            "write_index": torch.randperm(blocks * APPEND_BLOCK_SIZE)[:num_tokens],
            "cos_sin": rope_table(head_dim, APPEND_POSITIONS, 10000.0),
            "k_cache": torch.full(shape, float("nan"), dtype=dtype),
            "v_cache": torch.full(shape, float("nan"), dtype=dtype),
            "num_heads": heads,
            "q_norm_weight": norms[0],
            "k_norm_weight": norms[1],
            "eps": 1e-6,
        }

    return make


@pytest.fixture
def decode_case(attention_case):
    """make(contexts, ...): arguments of append_attention; the last position is not in the cache."""

    def make(contexts, *, norm=False, window=None, **shape):
        case = attention_case(contexts, **shape)
        heads, head_dim = case.q.shape[1:]
        kv_heads, dtype = case.k_cache.shape[2], case.q.dtype
        positions = case.batch.context_lens.long() - 1
        table = case.batch.block_table[case.batch.slots].long()
        blocks = table.gather(1, positions[:, None] // case.block_size)[:, 0]
        write_index = blocks * case.block_size + positions % case.block_size
        for cache in (case.k_cache, case.v_cache):
            cache.view(-1, kv_heads, head_dim)[write_index] = float("nan")
        norms = [torch.rand(head_dim).to(dtype) + 0.5 if norm else None for _ in range(2)]
        qkv = torch.randn(len(contexts), (heads + 2 * kv_heads) * head_dim).to(dtype)
        prepared = prepare_attention(case.batch, case.block_size, window)
        angles = rope_table(head_dim, max([1, *contexts]), 10000.0)
        caches = (case.k_cache, case.v_cache)
        return (qkv, positions, write_index, angles, *caches, heads, *norms, 1e-6, prepared)

    return make


@pytest.fixture
def guarded_outputs(monkeypatch):
    """What a launcher allocates starts as NaN, between NaNs that the kernel must not touch."""
    buffers = []

    def empty(*sizes, dtype=torch.float32, device="cpu"):
        shape = torch.Size(sizes if isinstance(sizes[0], int) else sizes[0])
        length = shape.numel() + 2 * GUARD
        buffers.append(torch.full((length,), float("nan"), dtype=dtype, device=device))
        return buffers[-1][GUARD:-GUARD].view(shape)

    def empty_like(x):
        return empty(x.shape, dtype=x.dtype, device=x.device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    assert buffers, "nothing was allocated"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


@dataclass
class SamplingCase:
    logits: Tensor  # f32[R, V], R = 10: one row of each kind
    slots: Tensor
    positions: Tensor
    params: SlotSampling


def logit_rows(vocab, random):
    """Ten kinds of rows: what models give, and what breaks selections."""
    x = torch.randn(10, vocab, generator=random) * 2.5
    x[1, torch.randint(vocab, (5,), generator=random)] += 25  # peaked
    x[2] = (x[2] * 4).round() / 4  # many ties
    x[3, torch.rand(vocab, generator=random) < 0.9] = -math.inf  # masked
    x[4] = -math.inf  # three finite values
    x[4, torch.randint(vocab, (3,), generator=random)] = 1.5
    x[5] = 0.0  # flat
    x[6] = -torch.rand(vocab, generator=random).clamp(min=1e-30).log().neg().log() * 2  # long tail
    x[7] = x[7].bfloat16().float()  # a coarse grid
    x[8] /= 0.05
    x[9] /= 3.0
    x[9, :2] = torch.tensor([0.0, -0.0])
    return x


@pytest.fixture
def sampling_rows():
    """make(vocab, seed): a row of each kind, f32[10, V]."""
    return lambda vocab, seed: logit_rows(vocab, torch.Generator().manual_seed(seed))


@pytest.fixture
def sampling_case():
    """make(vocab, seed): each kind of row under parameters drawn from a mix of all of them."""

    def make(vocab, seed, slots=24):
        random = torch.Generator().manual_seed(seed)

        def number(limit):
            return int(torch.randint(limit, (), generator=random))

        def pick(*choices):
            return choices[number(len(choices))]

        def ids(count):
            return torch.randint(vocab, (count,), generator=random).tolist()

        params = SlotSampling.zeros(slots, vocab)
        for slot in range(slots):
            values = SlotValues(
                temperature=pick(0.0, 0.05, 0.7, 1.0, 3.0),
                temperature_last=pick(False, False, True),
                top_n_sigma=pick(0.0, 0.0, 0.0, 1.0, 3.0),
                top_k=pick(0, 0, 1, 5, 50, vocab // 2, vocab),
                typical_p=pick(1.0, 1.0, 1.0, 0.9, 0.3),
                top_p=pick(1.0, 1.0, 0.9, 0.5, 0.99, 1e-9),
                min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0),
                xtc_probability=pick(0.0, 0.0, 0.5, 1.0),
                xtc_threshold=pick(0.1, 0.02),
                repetition_penalty=pick(1.0, 1.0, 1.3),
                presence_penalty=pick(0.0, 0.0, 0.5),
                frequency_penalty=pick(0.0, 0.3),
                logprobs=slot % 3,
                seed=number(1 << 62) * pick(1, -1),
                stop_ids=ids(3),
                min_position=pick(0, 0, 100),
                bias=pick({}, {}, dict(zip(ids(9), [5.0, -math.inf, -1.0] * 3, strict=True))),
                allowed_ids=pick(None, None, None, ids(vocab // 2)),
                prompt_ids=ids(40),
                output_ids=ids(40),
            )
            params.write(slot, values)
        return SamplingCase(
            logits=logit_rows(vocab, random),
            slots=torch.randperm(slots, generator=random)[:10],
            positions=torch.randint(200, (10,), generator=random),
            params=params,
        )

    return make
