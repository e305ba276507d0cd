"""The noise of `rng.py` inside Triton kernels: same words bit for bit, same formula.

-log1p(-u) is u + u^2/2 + ... + u^6/6 below u = 1/16 (what is left out is below 1e-8 of it) and
-log(1 - u) above (rounding 1 - u costs up to 5e-7 of it).
"""

import triton
import triton.language as tl

from millrace.kernels.rng import (
    CALLS_PER_TILE,
    MAX_UNIFORM,
    PURPOSE_DRAW,
    PURPOSE_XTC,
    TILE,
    WORD_SCALE,
)

_TILE = tl.constexpr(TILE)
_CALLS = tl.constexpr(CALLS_PER_TILE)
_DRAW = tl.constexpr(PURPOSE_DRAW)
_XTC = tl.constexpr(PURPOSE_XTC)
_WORD_SCALE = tl.constexpr(WORD_SCALE)
_MAX_UNIFORM = tl.constexpr(MAX_UNIFORM)
_SMALL = tl.constexpr(1 / 16)


@triton.jit
def _philox(seed, position, counters, PURPOSE: tl.constexpr):
    zero = (counters * 0).to(tl.uint32)
    c1 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counters.to(tl.uint32), c1, zero + PURPOSE, zero)


@triton.jit
def _uniform(words):
    """uint32 words -> f32 in (0, 1), see rng.py."""
    return tl.minimum((words.to(tl.float32) + 0.5) * _WORD_SCALE, _MAX_UNIFORM)


@triton.jit
def xtc_coin(seed, position):
    """The row's coin for XTC, f32[]."""
    word, _, _, _ = _philox(seed, position, tl.arange(0, 1), _XTC)
    return tl.max(_uniform(word), axis=0)


@triton.jit
def _gumbel(words):
    """uint32 words -> f32 noise, see rng.py."""
    u = _uniform(words)
    tail = u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6)))))
    exponential = tl.where(u < _SMALL, u + u * tail, -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def gumbel_at(seed, position, ids):
    """Noise of arbitrary ids: i32 -> f32."""
    counters = (ids // _TILE) * _CALLS + ids % _CALLS
    w0, w1, w2, w3 = _philox(seed, position, counters, _DRAW)
    which = (ids // _CALLS) % 4
    low, high = tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)
    return _gumbel(tl.where(which < 2, low, high))


@triton.jit
def gumbel_calls(seed, position, counters):
    """Noise of whole calls, [...] -> [..., 2, 2]: element (a, b) is of word 2 a + b of the call."""
    w0, w1, w2, w3 = _philox(seed, position, counters, _DRAW)
    return _gumbel(tl.join(tl.join(w0, w2), tl.join(w1, w3)))


@triton.jit
def gumbel_tile(seed, position, i_tile):
    """Noise of a tile, [CALLS, 4]: element (i, w) is that of id tile * 4096 + w * 1024 + i."""
    noise = gumbel_calls(seed, position, tl.arange(0, _CALLS) + i_tile * _CALLS)
    return tl.reshape(noise, (_CALLS, 4))
