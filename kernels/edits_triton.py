"""Logits as the filters see them, inside Triton kernels: steps 1 to 7 of `sampling.py`.

Every kernel that reads logits does it through `scaled_logits` or its two halves, elementwise and
without fused multiply-adds, so that each gets the same bits and none has to write [R, V] for the
next. A row's
numbers lie side by side in `SlotSampling.scalars`; its tables over the vocabulary are read only
where a flag says so.
"""

import triton
import triton.language as tl

from millrace.kernels.rng_triton import xtc_coin
from millrace.kernels.sampling import GREEDY_BELOW
from millrace.kernels.slot_sampling import MAX_STOP_IDS, SCALARS

_COLUMNS = tl.constexpr(len(SCALARS))
TEMPERATURE = tl.constexpr(SCALARS.index("temperature"))
_TEMPERATURE_LAST = tl.constexpr(SCALARS.index("temperature_last"))
TOP_N_SIGMA = tl.constexpr(SCALARS.index("top_n_sigma"))
TOP_K = tl.constexpr(SCALARS.index("top_k"))
TYPICAL_P = tl.constexpr(SCALARS.index("typical_p"))
TOP_P = tl.constexpr(SCALARS.index("top_p"))
MIN_P = tl.constexpr(SCALARS.index("min_p"))
LOGPROBS = tl.constexpr(SCALARS.index("logprobs"))
_XTC_PROBABILITY = tl.constexpr(SCALARS.index("xtc_probability"))
_XTC_THRESHOLD = tl.constexpr(SCALARS.index("xtc_threshold"))
_REPETITION = tl.constexpr(SCALARS.index("repetition_penalty"))
_PRESENCE = tl.constexpr(SCALARS.index("presence_penalty"))
_FREQUENCY = tl.constexpr(SCALARS.index("frequency_penalty"))
_STOPS = tl.constexpr(MAX_STOP_IDS)
_STOPS_PADDED = tl.constexpr(triton.next_power_of_2(MAX_STOP_IDS))
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
NO_XTC = tl.constexpr(2.0)
"""A threshold that no probability reaches."""


@triton.jit
def scalar(p_scalars, slot, COLUMN: tl.constexpr):
    return tl.load(p_scalars + slot * _COLUMNS + COLUMN)


@triton.jit
def temperature_factors(p_scalars, slot):
    """(whether the row samples, the factor before the filters, the factor after them)."""
    temperature = scalar(p_scalars, slot, TEMPERATURE)
    samples = temperature >= _GREEDY_BELOW
    inverse = tl.div_rn(1.0, tl.where(samples, temperature, 1.0))
    last = scalar(p_scalars, slot, _TEMPERATURE_LAST) > 0
    return samples, tl.where(last, 1.0, inverse), tl.where(last, inverse, 1.0)


@triton.jit
def xtc_threshold(p_scalars, p_seed, slot, position):
    """XTC's threshold if its coin falls so, else NO_XTC."""
    probability = scalar(p_scalars, slot, _XTC_PROBABILITY)
    threshold = tl.full((), NO_XTC, tl.float32)
    if probability > 0:
        falls = xtc_coin(tl.load(p_seed + slot), position) < probability
        threshold = tl.where(falls, scalar(p_scalars, slot, _XTC_THRESHOLD), threshold)
    return threshold


@triton.jit
def is_filtered(p_scalars, p_seed, slot, position):
    """Whether the row samples through any filter."""
    samples, _, _ = temperature_factors(p_scalars, slot)
    heads = (scalar(p_scalars, slot, TOP_N_SIGMA) > 0) | (scalar(p_scalars, slot, TOP_K) > 0)
    masses = (scalar(p_scalars, slot, TYPICAL_P) < 1) | (scalar(p_scalars, slot, TOP_P) < 1)
    xtc = xtc_threshold(p_scalars, p_seed, slot, position) < NO_XTC
    return samples & (heads | masses | (scalar(p_scalars, slot, MIN_P) > 0) | xtc)


@triton.jit
def load_logits(row, o_vocab, m_vocab):
    """f32 logits of the ids `o_vocab` as the model gave them, -inf where masked. `row` is the tuple
    that `edited_logits` takes apart."""
    return tl.load(row[0] + o_vocab, mask=m_vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def edited_logits(row, x, o_vocab, m_vocab):
    """`load_logits` through bias, bans, penalties and the temperature that comes before the
    filters."""
    _, slot, position, vocab, p_scalars, tables = row
    p_bias, p_has_bias, p_seen, p_counts, p_has_penalties, p_stop_ids, p_min_position = tables
    start = slot * vocab
    if tl.load(p_has_bias + slot):
        x += tl.load(p_bias + start + o_vocab, mask=m_vocab, other=0.0)
    if position < tl.load(p_min_position + slot):
        o_stop = tl.arange(0, _STOPS_PADDED)
        stop_ids = tl.load(p_stop_ids + slot * _STOPS + o_stop, mask=o_stop < _STOPS, other=-1)
        for i_stop in range(tl.sum((stop_ids >= 0).to(tl.int32), axis=0)):
            stop_id = tl.load(p_stop_ids + slot * _STOPS + i_stop)
            x = tl.where(o_vocab == stop_id, x + float("-inf"), x)
    if tl.load(p_has_penalties + slot):
        counts = tl.load(p_counts + start + o_vocab, mask=m_vocab, other=0)
        seen = tl.load(p_seen + start + o_vocab, mask=m_vocab, other=0).to(tl.int32)
        penalty = scalar(p_scalars, slot, _REPETITION)
        repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty)
        x = tl.where((counts > 0) | (seen != 0), repeated, x)
        said = scalar(p_scalars, slot, _FREQUENCY) * counts.to(tl.float32)
        said += scalar(p_scalars, slot, _PRESENCE)
        x = tl.where(counts > 0, x - said, x)
    _, before, _ = temperature_factors(p_scalars, slot)
    return x * before


@triton.jit
def scaled_logits(row, o_vocab, m_vocab):
    """f32 logits of the ids `o_vocab` as the filters see them, -inf where masked."""
    return edited_logits(row, load_logits(row, o_vocab, m_vocab), o_vocab, m_vocab)
