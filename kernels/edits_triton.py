"""Logits as the filters see them, inside Triton kernels: steps 1 to 7 of `sampling.py`.

Every kernel that reads logits does it through `scaled_logits` or its two halves, elementwise and
without fused multiply-adds, so that each gets the same bits and none has to write [R, V] for the
next. A row's numbers lie side by side in `SlotSampling.scalars`; its tables over the vocabulary are
read only where a flag says so.
"""

import triton
import triton.language as tl

from millrace.kernels.rng_triton import xtc_coin
from millrace.kernels.rows_triton import (
    FREQUENCY,
    MIN_P,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TEMPERATURE_LAST,
    TOP_K,
    TOP_N_SIGMA,
    TOP_P,
    TYPICAL_P,
    XTC_PROBABILITY,
    XTC_THRESHOLD,
    asked,
)
from millrace.kernels.sampling import GREEDY_BELOW
from millrace.kernels.slot_sampling import MAX_STOP_IDS
from millrace.kernels.token_mask import ALL, WORD_BITS

_STOPS = tl.constexpr(MAX_STOP_IDS)
_STOPS_PADDED = tl.constexpr(triton.next_power_of_2(MAX_STOP_IDS))
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_WORD_BITS = tl.constexpr(WORD_BITS)
_ALL = tl.constexpr(ALL)
NO_XTC = tl.constexpr(2.0)
"""A threshold that no probability reaches."""


@triton.jit
def temperature_factors(row):
    """(whether the row samples, the factor before the filters, the factor after them)."""
    temperature = asked(row, TEMPERATURE)
    samples = temperature >= _GREEDY_BELOW
    inverse = tl.div_rn(1.0, tl.where(samples, temperature, 1.0))
    last = asked(row, TEMPERATURE_LAST) > 0
    return samples, tl.where(last, 1.0, inverse), tl.where(last, inverse, 1.0)


@triton.jit
def xtc_threshold(row):
    """XTC's threshold if its coin falls so, else NO_XTC."""
    probability = asked(row, XTC_PROBABILITY)
    threshold = tl.full((), NO_XTC, tl.float32)
    if probability > 0:
        falls = xtc_coin(row.seed, row.position) < probability
        threshold = tl.where(falls, asked(row, XTC_THRESHOLD), threshold)
    return threshold


@triton.jit
def filters_of(row):
    """(top_k, typical_p, top_p, min_p, xtc), the last of them as `xtc_threshold`."""
    top_k, typical_p, top_p = asked(row, TOP_K), asked(row, TYPICAL_P), asked(row, TOP_P)
    return top_k, typical_p, top_p, asked(row, MIN_P), xtc_threshold(row)


@triton.jit
def is_filtered(row):
    """Whether the row samples through any filter."""
    samples, _, _ = temperature_factors(row)
    heads = (asked(row, TOP_N_SIGMA) > 0) | (asked(row, TOP_K) > 0)
    masses = (asked(row, TYPICAL_P) < 1) | (asked(row, TOP_P) < 1)
    xtc = xtc_threshold(row) < NO_XTC
    return samples & (heads | masses | (asked(row, MIN_P) > 0) | xtc)


@triton.jit
def load_logits(row, o_vocab, m_vocab):
    """f32 logits of the ids `o_vocab` as the model gave them, -inf where masked."""
    return tl.load(row.p_logits + o_vocab, mask=m_vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def edited_logits(row, x, o_vocab, m_vocab):
    """`load_logits` through bans, bias, penalties and the temperature that comes before the
    filters."""
    tables, slot = row.of, row.slot
    start = slot * tables.vocab
    if tl.load(tables.p_has_bans + slot):
        p_words = tables.p_allowed + slot * tl.cdiv(tables.vocab, _WORD_BITS)
        words = tl.load(p_words + o_vocab // _WORD_BITS, mask=m_vocab, other=_ALL)
        x = tl.where((words >> o_vocab % _WORD_BITS) & 1 == 0, x + float("-inf"), x)
    if tl.load(tables.p_has_bias + slot):
        x += tl.load(tables.p_bias + start + o_vocab, mask=m_vocab, other=0.0)
    if row.position < tl.load(tables.p_min_position + slot):
        o_stop, p_stop_ids = tl.arange(0, _STOPS_PADDED), tables.p_stop_ids + slot * _STOPS
        stop_ids = tl.load(p_stop_ids + o_stop, mask=o_stop < _STOPS, other=-1)
        for i_stop in range(tl.sum((stop_ids >= 0).to(tl.int32), axis=0)):
            x = tl.where(o_vocab == tl.load(p_stop_ids + i_stop), x + float("-inf"), x)
    if tl.load(tables.p_has_penalties + slot):
        counts = tl.load(tables.p_output_counts + start + o_vocab, mask=m_vocab, other=0)
        seen = tl.load(tables.p_prompt_seen + start + o_vocab, mask=m_vocab, other=0).to(tl.int32)
        penalty = asked(row, REPETITION)
        repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty)
        x = tl.where((counts > 0) | (seen != 0), repeated, x)
        said = asked(row, FREQUENCY) * counts.to(tl.float32) + asked(row, PRESENCE)
        x = tl.where(counts > 0, x - said, x)
    _, before, _ = temperature_factors(row)
    return x * before


@triton.jit
def scaled_logits(row, o_vocab, m_vocab):
    """f32 logits of the ids `o_vocab` as the filters see them, -inf where masked."""
    return edited_logits(row, load_logits(row, o_vocab, m_vocab), o_vocab, m_vocab)
