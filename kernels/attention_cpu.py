"""Paged attention on a CPU in plain PyTorch; `attention.py` says what it computes.

Decodes never copy the cache. A decode row's scores and its output are two sparse products over the
cache seen as one matrix [B * P * G, D], with the row's tokens as column indices:

    scores = sampled_addmm    only the wanted entries of q @ cache^T
    out    = embedding_bag    weighted sums of cache rows

which read each K and V row where it lies, several times as fast as gathering them for
`scaled_dot_product_attention`. sampled_addmm knows float32 and float64 only: keys in bf16 or fp16
are gathered and widened first.

Rows are grouped by padded length, which depends on the row alone (`padded_length`), and both
products work a row at a time. So a decode in float32 has the same bits whoever its neighbours are.
The padding points at the row's own last token and is masked: nothing outside a row's context is
ever read, not even to be multiplied by 0.

Prefill chunks are gathered row by row and left to `scaled_dot_product_attention`.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.attention import (
    AttentionBatch,
    KVScales,
    PreparedAttention,
    expect_attention_inputs,
    first_position,
    gather_context,
    prepare_attention,
    visible_positions,
)

CPU = torch.device("cpu")

MIN_LENGTH_STEP = 16  # tokens; finer steps would only make more groups
LENGTH_STEPS_PER_OCTAVE_LOG2 = 2  # four lengths between powers of two: at most 25% padding
MAX_GROUP_SCORES = 1 << 20  # scores (H * tokens) of a group: bounds its temporaries, 4 MiB each


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """n decode rows of one padded length L, as sparse matrices over the cache [B * P * G, D]."""

    rows: slice  # of the decode rows, ordered by length
    key_rows: Tensor  # i64 [n * G * L], cache row of each token of each KV head
    score_rows: Tensor  # i64 [n * H * L], the same for each query head
    offsets: Tensor  # i64 [n * H + 1], where each (row, head) begins in score_rows
    scores: Tensor  # f32 CSR [n * H, B * P * G] with columns score_rows; values are scratch
    mask: Tensor  # f32 [n, 1, L]: 0, or -inf on padding
    shape: tuple[int, int, int]  # (n, H, L)


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One prefill chunk: its queries, its context, and the mask where SDPA's own does not do."""

    queries: slice  # of q
    blocks: Tensor  # i32, the blocks that hold positions first .. context - 1
    num_tokens: int  # context - first; the first position seen is at the start of blocks[0]
    mask: Tensor | None  # f32 [queries, num_tokens]: 0 or -inf; None for plain causal


@dataclass(frozen=True, slots=True)
class CpuAttention:
    """A prepared batch. Decode groups depend on the number of heads: the first layer makes them."""

    prepared: PreparedAttention
    lengths: list[int]  # padded length of each decode row
    order: Tensor | None  # i64 [num_decodes], the decode rows by length; None: already in order
    prefills: list[PrefillRow]
    groups: dict[tuple[int, torch.Size], list[DecodeGroup]] = field(default_factory=dict)

    def decode_groups(self, num_heads: int, cache_shape: torch.Size) -> list[DecodeGroup]:
        """The decode rows of the batch for H query heads over caches of this shape [B, P, G, D]."""
        key = (num_heads, cache_shape)
        if key not in self.groups:
            self.groups[key] = list(_group_decodes(self, num_heads, cache_shape))
        return self.groups[key]


def prepare_attention_cpu(
    batch: AttentionBatch, block_size: int, window: int | None = None
) -> CpuAttention:
    """Check the batch, its values included, and work out what every layer shares."""
    prepared = prepare_attention(batch, block_size, window)
    starts, contexts = batch.query_start.tolist(), batch.context_lens.tolist()
    lengths: list[int] = []
    prefills: list[PrefillRow] = []
    for i_row, context in enumerate(contexts):
        queries = slice(starts[i_row], starts[i_row + 1])
        num_queries = queries.stop - queries.start
        if not 1 <= num_queries <= context <= batch.max_context_len:
            raise ValueError(
                f"context_lens[{i_row}]: expected {num_queries} queries (at least 1) to "
                f"{batch.max_context_len} (max_context_len), got {context}"
            )
        if i_row >= batch.num_decodes:
            prefills.append(_prefill_row(prepared, i_row, queries, context))
        elif num_queries == 1:
            lengths.append(padded_length(context if window is None else min(context, window)))
        else:
            raise ValueError(
                f"query_start: expected 1 query in decode row {i_row}, got {num_queries}"
            )
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    order = None if by_length == list(range(len(lengths))) else torch.tensor(by_length)
    return CpuAttention(prepared, lengths, order, prefills)


def paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: CpuAttention,
    *,
    scale: float,
    softcap: float | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`paged_attention_reference`, fast on a CPU: q [T, H, D] -> [T, H, D]. No quantized caches."""
    block_size = prepared.prepared.block_size
    expect_attention_inputs(q, k_cache, v_cache, block_size, scale, softcap, kv_scales)
    if kv_scales is not None or k_cache.dtype != q.dtype:
        raise ValueError(
            f"k_cache: expected {q.dtype} without kv_scales on a CPU, got {k_cache.dtype}"
        )
    out = torch.empty(q.shape, dtype=q.dtype)
    num_decodes, order = prepared.prepared.batch.num_decodes, prepared.order
    decode_q, decode_out = q[:num_decodes], out[:num_decodes]
    if order is not None:
        decode_q, decode_out = decode_q[order], torch.empty_like(decode_out)
    for group in prepared.decode_groups(q.shape[1], k_cache.shape):
        decode_out[group.rows] = _attend_decodes(
            decode_q[group.rows], k_cache, v_cache, group, scale, softcap
        )
    if order is not None:
        out.index_copy_(0, order, decode_out)
    for row in prepared.prefills:
        out[row.queries] = _attend_prefill(q[row.queries], k_cache, v_cache, row, scale, softcap)
    return out


def padded_length(num_tokens: int) -> int:
    """The length at which a row with so many visible tokens is computed; 300 -> 320."""
    step = 1 << max(0, (num_tokens - 1).bit_length() - 1 - LENGTH_STEPS_PER_OCTAVE_LOG2)
    step = max(step, MIN_LENGTH_STEP)
    return -(-num_tokens // step) * step


def _group_decodes(
    attention: CpuAttention, num_heads: int, cache_shape: torch.Size
) -> Iterator[DecodeGroup]:
    begin = 0
    for length, same in itertools.groupby(sorted(attention.lengths)):
        end = begin + len(list(same))
        at_once = max(1, MAX_GROUP_SCORES // (num_heads * length))
        while begin < end:
            rows = slice(begin, min(begin + at_once, end))
            yield _decode_group(attention, rows, length, num_heads, cache_shape)
            begin = rows.stop


def _decode_group(
    attention: CpuAttention, rows: slice, length: int, num_heads: int, cache_shape: torch.Size
) -> DecodeGroup:
    batch, window = attention.prepared.batch, attention.prepared.window
    num_blocks, block_size, num_kv_heads, _ = cache_shape
    # torch's sparse product loses values where a row has more entries than the matrix has columns.
    length = min(length, num_blocks * block_size * num_kv_heads)
    batch_rows = rows if attention.order is None else attention.order[rows]
    context = batch.context_lens[batch_rows].long().unsqueeze(1)
    first = 0 if window is None else (context - window).clamp_(min=0)
    position = (first + torch.arange(length)).expand(rows.stop - rows.start, length)
    mask = torch.zeros(position.shape).masked_fill_(position >= context, -torch.inf)
    position = torch.minimum(position, context - 1)
    blocks = batch.block_table[batch.slots[batch_rows]].long().gather(1, position // block_size)
    token = (blocks * block_size + position % block_size).unsqueeze(1)  # [n, 1, L]
    key_rows = token * num_kv_heads + torch.arange(num_kv_heads).unsqueeze(1)  # [n, G, L]
    group = num_heads // num_kv_heads
    score_rows = key_rows.unsqueeze(2).expand(-1, -1, group, -1).flatten()
    offsets = torch.arange(0, score_rows.numel() + 1, length)
    return DecodeGroup(
        rows=rows,
        key_rows=key_rows.flatten(),
        score_rows=score_rows,
        offsets=offsets,
        scores=_csr_pattern(offsets, score_rows, num_blocks * block_size * num_kv_heads),
        mask=mask.unsqueeze(1),
        shape=(rows.stop - rows.start, num_heads, length),
    )


def _csr_pattern(offsets: Tensor, columns: Tensor, num_columns: int) -> Tensor:
    """An f32 CSR matrix with these columns in each row, and zeros for values."""
    with warnings.catch_warnings():  # torch calls all of its CSR support "beta", once a process
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            offsets,
            columns,
            torch.zeros(columns.shape),
            size=(offsets.shape[0] - 1, num_columns),
            check_invariants=False,  # columns repeat in the padding, which sampled_addmm allows
        )


def _attend_decodes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: DecodeGroup,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """q [n, H, D] of one group -> [n, H, D]."""
    head_dim = q.shape[2]
    keys, values = k_cache.view(-1, head_dim), v_cache.view(-1, head_dim)
    if q.dtype == torch.float32 and softcap is None:
        scores = _scores_in_place(q, keys, group, scale)
    else:
        scores = _scores_of_copies(q, keys, group, scale, softcap)
    weights = scores.softmax(dim=-1).to(q.dtype)
    attended = F.embedding_bag(
        group.score_rows,
        values,
        group.offsets,
        mode="sum",
        per_sample_weights=weights.flatten(),
        include_last_offset=True,
    )
    return attended.view(q.shape)


def _scores_in_place(q: Tensor, keys: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    """mask + scale * q . k, keys left where they are: q f32 [n, H, D] -> f32 [n, H, L].

    sampled_addmm adds to what is there, which is the mask: what an earlier layer left must go in
    any case, for even with beta = 0 a NaN of it would stay.
    """
    scores = group.scores.values().view(group.shape)
    scores.copy_(group.mask)
    torch.sparse.sampled_addmm(
        group.scores, q.flatten(0, 1), keys.t(), alpha=scale, out=group.scores
    )
    return scores


def _scores_of_copies(
    q: Tensor, keys: Tensor, group: DecodeGroup, scale: float, softcap: float | None
) -> Tensor:
    """mask + cap(scale * q . k) over copied keys: q of any floating dtype -> f32 [n, H, L]."""
    length, head_dim = group.shape[2], keys.shape[1]
    copies = keys.index_select(0, group.key_rows).float().view(-1, length, head_dim)
    queries = q.float().mul(scale).view(copies.shape[0], -1, head_dim)  # [n * G, H / G, D]
    scores = torch.bmm(queries, copies.transpose(1, 2)).view(group.shape)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.add_(group.mask)


def _prefill_row(
    prepared: PreparedAttention, i_row: int, queries: slice, context: int
) -> PrefillRow:
    batch, block_size, window = prepared.batch, prepared.block_size, prepared.window
    num_queries = queries.stop - queries.start
    first = first_position(num_queries, context, prepared)
    blocks = batch.block_table[batch.slots[i_row], first // block_size :]
    mask = None
    if num_queries < context or (window is not None and window < context):
        visible = visible_positions(num_queries, context, window, CPU)[:, first:]
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return PrefillRow(queries, blocks, context - first, mask)


def _attend_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row: PrefillRow,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """q [n, H, D] of one chunk -> [n, H, D]. For SDPA, KV heads are a batch of H / G heads each."""
    num_queries, _, head_dim = q.shape
    queries = q.reshape(num_queries, k_cache.shape[2], -1, head_dim).permute(1, 2, 0, 3)
    keys = gather_context(k_cache, row.blocks, row.num_tokens).transpose(0, 1).unsqueeze(1)
    values = gather_context(v_cache, row.blocks, row.num_tokens).transpose(0, 1).unsqueeze(1)
    group = queries.shape[1]  # expanding by stride 0 copies nothing
    keys = keys.expand(-1, group, -1, -1)
    values = values.expand(-1, group, -1, -1)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=row.mask, is_causal=row.mask is None, scale=scale
        )
    else:
        attended = _softcapped(queries, keys, values, row.mask, scale, softcap)
    return attended.permute(2, 0, 1, 3).flatten(1, 2)


def _softcapped(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """SDPA with soft-capped scores, in float32; shapes as for `scaled_dot_product_attention`."""
    scores = torch.matmul(queries.float(), keys.float().transpose(-1, -2)).mul_(scale)
    scores.div_(softcap).tanh_().mul_(softcap)
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf).triu_(1)
    return torch.matmul(scores.add_(mask).softmax(dim=-1), values.float()).to(queries.dtype)
