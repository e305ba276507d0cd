"""Paged attention on a GPU, in Triton; `attention.py` says what it computes.

One launch serves decodes and prefill chunks alike. Axis 1 of the grid is the KV head, whose H / G
query heads share a tile, so that K and V are read once for all of them. Axis 0 lists the work:

    decodes     the rows that one program does, then the splits     `attention_decode_triton.py`
    prefills    the last block of queries, ...                      `attention_prefill_triton.py`

A split is SPLIT positions of the context at a multiple of SPLIT, whatever the batch. A decode's
splits are summed by programs of their own and folded by a merge kernel; a prefill program walks
and folds them itself, with the same arithmetic in the same order (`attention_tiles_triton.py`). So
the bits of a position depend neither on its neighbours, nor on how its prompt was cut, nor on
whether it was decoded. The last holds if the device multiplies 16 rows and BLOCK_M rows alike:
tests/kernels/gpu/test_attention_gpu.py asks it.

The grid is an upper bound from numbers that the host knows, and surplus programs return at once:
a launch never waits for the device, and a graph may replay it. Prefill blocks come in descending
order, as the last queries of a chunk see most and should not start last. A head dimension that is
no power of two is padded in the tile, and the padding is not read: 80 and 96 cost the memory
traffic of 80 and 96, and the multiplications of 128.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.attention import KVScales, PreparedAttention, expect_attention_inputs
from millrace.kernels.attention_decode_triton import attend_decode, find_work, merge_kernel
from millrace.kernels.attention_prefill_triton import attend_prefill
from millrace.kernels.configs import UNFUSED, LaunchConfig, launch_config

SPLIT = 256  # positions; a part of the result's bits
MIN_BLOCK_M = 16  # rows of the smallest matrix instruction
MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634
MERGE_UNROLL = 8
MERGE_OPTIONS = {"num_warps": 1, **UNFUSED}
FP8_CAPABILITY = (8, 9)  # the first NVIDIA GPUs that convert float8_e4m3fn
HOPPER = (9, 0)


@triton.jit(do_not_specialize=["num_decodes", "num_rows", "capacity"])
def attention_kernel(
    p_q,  # [T, H, D]
    p_k,  # [B, P, G, D]
    p_v,  # [B, P, G, D]
    p_block_table,  # i32 [S, max_blocks]
    p_slots,  # i64 [R]
    p_query_start,  # i32 [R + 1]
    p_context_lens,  # i32 [R]
    p_k_scale,  # f32 [G]
    p_v_scale,  # f32 [G]
    p_out,  # [T, H, D]
    p_partial,  # f32 [capacity, H, D], unnormalised sums
    p_max,  # f32 [capacity, H], base-2 maxima
    p_sum,  # f32 [capacity, H]
    scale,  # scale * log2(e); with a soft cap, scale / softcap
    softcap_log2,  # softcap * log2(e)
    num_decodes,
    num_rows,
    capacity,
    stride_q_token,
    stride_q_head,
    stride_table,
    HAS_DECODES: tl.constexpr,
    HAS_PREFILLS: tl.constexpr,
    SCALED: tl.constexpr,  # whether there are scales of K and V
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DECODE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bf16 as if it were uint16
):
    i_kv_head = tl.program_id(1).to(tl.int64)
    p_k += i_kv_head * HEAD_DIM
    p_v += i_kv_head * HEAD_DIM
    if SCALED:
        scale *= tl.load(p_k_scale + i_kv_head)
    i_item = tl.program_id(0)
    num_items = num_decodes + capacity if HAS_DECODES else 0
    # Two branches, and of a batch with one kind of rows only that one: it takes fewer registers.
    if HAS_DECODES:  # noqa: SIM102 - known to the compiler, unlike the next
        if i_item < num_items:
            i_row, context, begin, end, part = find_work(
                i_item, p_context_lens, num_decodes, capacity, SPLIT, WINDOW
            )
            if i_row >= 0:
                attend_decode(
                    i_row, context, begin, end, part, i_kv_head, p_q, p_k, p_v, p_block_table,
                    p_slots, p_v_scale, p_out, p_partial, p_max, p_sum, scale, softcap_log2,
                    stride_q_token, stride_q_head, stride_table, SCALED, NUM_KV_HEADS, GROUP,
                    HEAD_DIM, BLOCK_D, DECODE_M, BLOCK_SIZE, SPLIT, TILE, WINDOW, SOFTCAP, UPCAST,
                )  # fmt: skip
    if HAS_PREFILLS:  # noqa: SIM102
        if i_item >= num_items:
            attend_prefill(
                tl.num_programs(0) - 1 - i_item, i_kv_head, p_q, p_k, p_v, p_block_table, p_slots,
                p_query_start, p_context_lens, p_v_scale, p_out, scale, softcap_log2, num_decodes,
                num_rows, stride_q_token, stride_q_head, stride_table, SCALED, NUM_KV_HEADS,
                GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_SIZE, SPLIT, TILE, WINDOW, SOFTCAP,
                UPCAST,
            )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: PreparedAttention,
    *,
    scale: float,
    softcap: float | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`paged_attention_reference` in Triton: q [T, H, D] -> [T, H, D].

    q may be strided but for its last dimension. ValueError names what does not fit.
    """
    expect_attention_inputs(q, k_cache, v_cache, prepared.block_size, scale, softcap, kv_scales)
    _expect_supported(q, k_cache)
    batch, window = prepared.batch, prepared.window or 0
    num_heads, head_dim = q.shape[1:]
    num_decodes, num_rows = batch.num_decodes, batch.slots.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    group = num_heads // k_cache.shape[2]
    config = attention_config(q.device, q.dtype, head_dim)
    block_m = max(config.constants["BLOCK_M"], triton.next_power_of_2(group))
    num_blocks = 0
    if num_rows > num_decodes:
        num_blocks = (q.shape[0] - num_decodes) // (block_m // group) + num_rows - num_decodes
    cache_tokens = k_cache.shape[0] * k_cache.shape[1]
    capacity = most_parts(num_decodes, batch.max_context_len, window, cache_tokens)
    scratch = split_scratch(capacity, num_heads, head_dim, q.device)
    k_scale, v_scale = (None, None) if kv_scales is None else (kv_scales.key, kv_scales.value)
    shared = {  # constants of both kernels
        "SCALED": kv_scales is not None,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(MIN_BLOCK_M, triton.next_power_of_2(head_dim)),
        "SPLIT": SPLIT,
        "WINDOW": window,
    }
    attention_kernel[(num_decodes + capacity + num_blocks, k_cache.shape[2])](
        q, k_cache, v_cache, batch.block_table, batch.slots, batch.query_start,
        batch.context_lens, k_scale, v_scale, out, *scratch,
        scale * LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        num_decodes, num_rows, capacity, q.stride(0), q.stride(1), batch.block_table.stride(0),
        HAS_DECODES=num_decodes > 0, HAS_PREFILLS=num_blocks > 0, NUM_KV_HEADS=k_cache.shape[2],
        DECODE_M=max(MIN_BLOCK_M, triton.next_power_of_2(group)), BLOCK_M=block_m,
        BLOCK_SIZE=prepared.block_size, TILE=config.constants["TILE"], SOFTCAP=softcap is not None,
        UPCAST=q.device.type == "cpu" and q.dtype == torch.bfloat16,
        **shared, **config.options, **UNFUSED,
    )  # fmt: skip
    if capacity:
        merge_kernel[(num_decodes, num_heads)](
            *scratch, batch.context_lens, v_scale, out, num_decodes, capacity,
            UNROLL=MERGE_UNROLL, **shared, **MERGE_OPTIONS,
        )  # fmt: skip
    return out


def most_parts(num_decodes: int, max_context_len: int, window: int, cache_tokens: int) -> int:
    """Splits that scratch has room for, from what a captured graph knows: 0 if none is needed.

    The least of two bounds. A row has at most the splits of max_context_len, or of a window: one of
    40 tokens touches at most two, wherever it lies. And rows that share no block hold together no
    more tokens than the cache has, and one ragged split each. Rows that share a prefix may exceed
    the second bound: those that do not fit are done by one program a head (`find_work`), and then
    there are more than cache_tokens / SPLIT splits of others and whole rows to fill the device.
    Example: 256 rows of up to 131072 tokens in a cache of 900,000: 3771 splits, not 131,072.
    """
    if window:
        max_context_len = min(max_context_len, window + SPLIT - 1)
    splits = -(-max_context_len // SPLIT)
    if splits < 2:
        return 0
    return min(num_decodes * splits, cache_tokens // SPLIT + num_decodes)


def split_scratch(
    capacity: int, num_heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For so many splits: f32 [capacity, H, D], and twice f32 [capacity, H] (maxima, sums)."""
    partial = torch.empty(capacity, num_heads, head_dim, device=device)
    maxima = torch.empty(capacity, num_heads, device=device)
    return partial, maxima, torch.empty_like(maxima)


@cache
def attention_config(device: torch.device, dtype: torch.dtype, head_dim: int) -> LaunchConfig:
    """The launch for q of this dtype and head dimension; nothing else may choose it."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    key = f"{str(dtype).removeprefix('torch.')} D{head_dim}"
    return launch_config("paged_attention", key, device, default_config(dtype, head_dim, hopper))


def default_config(dtype: torch.dtype, head_dim: int, hopper: bool) -> LaunchConfig:
    """BLOCK_M rows of a prefill tile, TILE positions of a step, as large as registers allow.

    A prefill program holds two states of BLOCK_M x D float32. Hopper's matrix instructions read K
    and V from shared memory, which leaves room for twice the rows. Float32 is for comparison: it
    has no exact matrix instruction, and beyond D = 128 it spills.
    """
    if dtype == torch.float32:
        return LaunchConfig(8, 1, {"BLOCK_M": 16, "TILE": 16})
    if hopper and head_dim <= 128:
        return LaunchConfig(8, 3, {"BLOCK_M": 128, "TILE": 64})
    if hopper or head_dim <= 128:
        return LaunchConfig(8, 2 if hopper else 3, {"BLOCK_M": 64, "TILE": 32})
    return LaunchConfig(8, 2, {"BLOCK_M": 32, "TILE": 32})


def _expect_supported(q: Tensor, k_cache: Tensor) -> None:
    if q.stride(-1) != 1:
        raise ValueError(f"q: expected a last stride of 1, got {q.stride(-1)}")
    if q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dimension up to {MAX_HEAD_DIM}, got {q.shape[2]}")
    if k_cache.dtype == torch.float8_e4m3fn and q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if torch.version.hip is None and capability < FP8_CAPABILITY:
            raise ValueError(
                f"k_cache: expected a GPU of compute capability {FP8_CAPABILITY} for float8_e4m3fn,"
                f" got {capability}"
            )
