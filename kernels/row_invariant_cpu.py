"""The CPU's operations so that a row's bits depend on the row alone; float32 only.

Batch, chunk and neighbours change a row's last bits in four ways. None is left here:

    products       oneDNN picks its kernel by the number of rows. Here a product has one of the
                   `ROW_SIZES`, its last rows padded with zeros, and of these only sizes that were
                   seen to agree: `agreeing_sizes` multiplies one random row, in every place of
                   every size, and compares bits. The order of a sum does not depend on what is
                   summed, so what agrees for one row and one weight of a shape does for all. The
                   weight is the model's first of that shape, as it has been packed anyhow; only
                   where its elements are too much alike to show an order, a random one is made
    elementwise    torch deals out more than GRAIN elements to its threads. Where a thread's share
                   ends in the middle of a row it takes exp from another library than elsewhere.
                   Here a call has at most GRAIN elements, or one row
    prefills       the blocks of `scaled_dot_product_attention` follow the chunk. Here each query of
                   a prompt is a row of its own, as that of a decode is; `attention_cpu.py` works a
                   decode row at a time
    draws          as elementwise: one row a call

So a token's keys, values and logits have the same bits in a chunk of any length and in a decode. A
prompt pays for it most: its attention reads the context for every query again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from millrace.kernels import activation, attention_cpu, kv_append, norm
from millrace.kernels.attention import AttentionBatch, prepare_attention
from millrace.kernels.attention_cpu import CpuAttention
from millrace.kernels.checks import expect
from millrace.kernels.matmul import PackedLinear, pack_linear
from millrace.kernels.sampling import SampledTokens
from millrace.kernels.sampling_cpu import sample_cpu
from millrace.kernels.slot_sampling import SlotSampling

GRAIN = 32768  # elements that one thread computes alone: at::internal::GRAIN_SIZE
ROW_SIZES = (1, 4, 16, 64)
SAMPLES, DISTINCT = 4096, 256  # bf16 leaves some 1,300 of a normal sample


class NotRowInvariant(ValueError):
    """This CPU's library has no product that gives all its rows the same bits."""


@dataclass(frozen=True, slots=True)
class RowInvariantLinear(PackedLinear):
    """A linear layer that multiplies so many rows at once and no others."""

    row_sizes: tuple[int, ...]  # ascending

    def __call__(self, x: Tensor) -> Tensor:
        """As PackedLinear."""
        if len(x) == 0:
            return PackedLinear.__call__(self, x)
        pieces = [self._multiply(piece) for piece in x.split(self.row_sizes[-1])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _multiply(self, x: Tensor) -> Tensor:
        rows = len(x)
        padded = next(size for size in self.row_sizes if size >= rows)
        if padded > rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, padded - rows))
        return PackedLinear.__call__(self, x)[:rows]


@dataclass(frozen=True, slots=True)
class RowInvariantPacking:
    """`pack_linear` for float32 weights of one model: each shape is looked at once."""

    _agreed: dict[tuple[int, int, bool, int], tuple[int, ...]] = field(default_factory=dict)

    def __call__(self, weight: Tensor, bias: Tensor | None = None) -> RowInvariantLinear:
        """NotRowInvariant where the library has no such product of this shape."""
        expect("weight", weight, (None, None), torch.float32)
        packed = pack_linear(weight, bias)
        # The number of threads decides how a product is cut.
        shape = (*weight.shape, bias is not None, torch.get_num_threads())
        if shape not in self._agreed:
            self._agreed[shape] = agreeing_sizes(packed if tells(weight) else random_like(packed))
        own = {field.name: getattr(packed, field.name) for field in fields(packed)}
        return RowInvariantLinear(**own, row_sizes=self._agreed[shape])


def tells(weight: Tensor) -> bool:
    """Whether a sum over these elements would show that its order is another one.

    Zeros or ones would not. Looks at SAMPLES of them, spread over the weight.
    """
    sample = weight.reshape(-1)[:: weight.numel() // SAMPLES or 1]
    return len(sample.unique()) >= DISTINCT


def random_like(packed: PackedLinear) -> PackedLinear:
    """A layer of the same shape that tells; as slow to make as it is large."""
    random = torch.Generator().manual_seed(0)
    weight = torch.empty(packed.out_features, packed.in_features).normal_(generator=random)
    return pack_linear(weight, None if packed.bias is None else weight[:, 0].contiguous())


def agreeing_sizes(linear: PackedLinear) -> tuple[int, ...]:
    """The ROW_SIZES whose products give a row the same bits in any place."""
    random = torch.Generator().manual_seed(0)
    row = torch.empty(1, linear.in_features).normal_(generator=random)
    found: dict[int, Tensor] = {}
    for size in ROW_SIZES:
        y = linear(row.repeat(size, 1))
        if torch.equal(y, y[:1].expand_as(y)):
            found[size] = y[0].clone()
    if not found:
        shape = [linear.out_features, linear.in_features]
        raise NotRowInvariant(f"weight {shape}: this CPU's library sums its rows differently")
    largest = found[max(found)]
    return tuple(size for size, y in found.items() if torch.equal(y, largest))


def in_pieces(operation: Callable[..., Tensor], elements: int, *rows: Tensor) -> Tensor:
    """operation(*rows) on a few of the rows [T, ...] at a time, `elements` being those of a row."""
    few = max(1, GRAIN // elements)
    if len(rows[0]) <= few:
        return operation(*rows)
    pieces = zip(*(tensor.split(few) for tensor in rows), strict=True)
    return torch.cat([operation(*piece) for piece in pieces])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `norm.rms_norm`, x [T, E]."""
    return in_pieces(lambda some: norm.rms_norm(some, weight, eps), x.shape[-1], x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `norm.add_rms_norm`; a sum of two has the same bits however it is dealt out."""
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual


def silu_mul(gate_up: Tensor, interleaved: bool = False) -> Tensor:
    """As `activation.silu_mul`."""
    return in_pieces(
        lambda some: activation.silu_mul(some, interleaved), gate_up.shape[1] // 2, gate_up
    )


def append(
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
    """As `kv_append.kv_append`, without scales."""

    def some(qkv: Tensor, positions: Tensor, write_index: Tensor) -> Tensor:
        return kv_append.kv_append(
            *(qkv, positions, write_index, cos_sin, k_cache, v_cache, num_heads),
            *(q_norm_weight, k_norm_weight, eps),
        )

    return in_pieces(some, qkv.shape[1], qkv, positions, write_index)


def prepare_queries(
    batch: AttentionBatch, block_size: int, window: int | None = None
) -> CpuAttention:
    """`prepare_attention_cpu` of the batch in which each query is a decode row.

    Example: queries of rows with 1 and 3 of them and contexts of 8 and 5 see 8, 3, 4 and 5 tokens.
    """
    prepare_attention(batch, block_size, window)  # checks it
    queries = batch.query_start.diff().long()
    num_queries = int(batch.query_start[-1])
    unseen = batch.query_start[1:].repeat_interleave(queries) - 1 - torch.arange(num_queries)
    by_query = AttentionBatch(
        block_table=batch.block_table,
        slots=batch.slots.repeat_interleave(queries),
        query_start=torch.arange(num_queries + 1, dtype=torch.int32),
        context_lens=(batch.context_lens.repeat_interleave(queries) - unseen).int(),
        max_query_len=min(1, num_queries),
        max_context_len=batch.max_context_len,
        num_decodes=num_queries,
    )
    return attention_cpu.prepare_attention_cpu(by_query, block_size, window)


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    scored: bool = False,
    plain: bool = False,
) -> SampledTokens:
    """As `sample_cpu`, a row at a time."""
    drawn = [
        sample_cpu(logits[i : i + 1], slots[i : i + 1], positions[i : i + 1], params, scored)
        for i in range(len(slots))
    ]
    if not drawn:
        return sample_cpu(logits, slots, positions, params, scored)
    return SampledTokens(
        torch.cat([row.token_ids for row in drawn]), torch.cat([row.ok for row in drawn])
    )
