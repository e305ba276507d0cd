"""What a sampling kernel reads of the rows it is launched for, as one argument: a named tuple.

`rows_of` makes it on the host, of tensors; in the kernel its fields are the pointers to them. A
kernel takes its row with `row_at`, and hands that on to whatever asks about the row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.slot_sampling import SCALARS, SlotSampling

_COLUMNS = tl.constexpr(len(SCALARS))
TEMPERATURE = tl.constexpr(SCALARS.index("temperature"))
TEMPERATURE_LAST = tl.constexpr(SCALARS.index("temperature_last"))
TOP_N_SIGMA = tl.constexpr(SCALARS.index("top_n_sigma"))
TOP_K = tl.constexpr(SCALARS.index("top_k"))
TYPICAL_P = tl.constexpr(SCALARS.index("typical_p"))
TOP_P = tl.constexpr(SCALARS.index("top_p"))
MIN_P = tl.constexpr(SCALARS.index("min_p"))
LOGPROBS = tl.constexpr(SCALARS.index("logprobs"))
XTC_PROBABILITY = tl.constexpr(SCALARS.index("xtc_probability"))
XTC_THRESHOLD = tl.constexpr(SCALARS.index("xtc_threshold"))
REPETITION = tl.constexpr(SCALARS.index("repetition_penalty"))
PRESENCE = tl.constexpr(SCALARS.index("presence_penalty"))
FREQUENCY = tl.constexpr(SCALARS.index("frequency_penalty"))


class Rows(NamedTuple):
    """R rows of logits and the tables of S slots: tensors of a launch, pointers in a kernel."""

    p_logits: Any  # [R, V]
    p_slots: Any  # i64[R]
    p_positions: Any  # i64[R], of the tokens being drawn
    p_scalars: Any  # f32[S, len(SCALARS)], and the rest of SlotSampling
    p_seed: Any
    p_bias: Any
    p_has_bias: Any
    p_allowed: Any
    p_has_bans: Any
    p_prompt_seen: Any
    p_output_counts: Any
    p_has_penalties: Any
    p_stop_ids: Any
    p_min_position: Any
    stride_logits: Any  # from row to row
    vocab: Any


class Row(NamedTuple):
    """One of them, in a kernel."""

    p_logits: Any  # [V]
    slot: Any
    position: Any
    seed: Any
    of: Any  # the Rows


def rows_of(logits: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling) -> Rows:
    """The argument of a launch, of tensors that `check_inputs` has passed."""
    return Rows(
        p_logits=logits,
        p_slots=slots,
        p_positions=positions,
        p_scalars=params.scalars,
        p_seed=params.seed,
        p_bias=params.bias,
        p_has_bias=params.has_bias,
        p_allowed=params.allowed,
        p_has_bans=params.has_bans,
        p_prompt_seen=params.prompt_seen,
        p_output_counts=params.output_counts,
        p_has_penalties=params.has_penalties,
        p_stop_ids=params.stop_ids,
        p_min_position=params.min_position,
        stride_logits=logits.stride(0),
        vocab=logits.shape[1],
    )


@triton.jit
def row_at(rows, i_row):
    """Row `i_row` (int64)."""
    slot, position = tl.load(rows.p_slots + i_row), tl.load(rows.p_positions + i_row)
    p_logits, seed = rows.p_logits + i_row * rows.stride_logits, tl.load(rows.p_seed + slot)
    return Row(p_logits, slot, position, seed, rows)


@triton.jit
def scalar(p_scalars, slot, COLUMN: tl.constexpr):
    return tl.load(p_scalars + slot * _COLUMNS + COLUMN)


@triton.jit
def asked(row, COLUMN: tl.constexpr):
    """The number that the row's request has in a column of SCALARS."""
    return scalar(row.of.p_scalars, row.slot, COLUMN)
