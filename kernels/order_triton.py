"""Floats as integers that sort alike, for Triton kernels that select or sort tokens.

A token's key is an integer that no other token of its row shares, and that ascends by (value, then
id descending): the greatest key is the best token, of equal values that with the lowest id.
Example: 1.0 has the bits 0x3F800000, which are its order; token 7 with that value has the key
(0x3F800000 + 2^31) << 20 | 0xFFFFF - 7.
"""

import triton
import triton.language as tl

ID_BITS = tl.constexpr(20)
KEY_BITS = tl.constexpr(32 + 20)
NO_ID = tl.constexpr((1 << 20) - 1)
"""Above every token id. `id ^ NO_ID` is NO_ID - id, and the way back."""
SIGN = tl.constexpr(1 << 31)


@triton.jit
def order_of(x):
    """f32 -> i32 in the same order; -0.0 counts as 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(order):
    """The f32 of an `order_of`."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x, ids):
    """(f32, i32) -> i64 >= 0."""
    return ((order_of(x).to(tl.int64) + SIGN) << ID_BITS) | (ids ^ NO_ID).to(tl.int64)


@triton.jit
def lowest_key(x):
    """f32 -> i64, the least key of a token at least as good as x."""
    return (order_of(x).to(tl.int64) + SIGN) << ID_BITS


@triton.jit
def nearness(x, expected):
    """i64 >= 0 that grows as |x - expected| falls."""
    return (order_of(tl.abs(x - expected)) ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def survives(keys, x, kept):
    """Whether tokens are among those that `kept` describes, (low, high, near, expected): keys from
    low to high, as near to the expected logit as `near`."""
    low, high, near, expected = kept
    return (keys >= low) & (keys <= high) & (nearness(x, expected) >= near)


@triton.jit
def store_kept(p_kept, kept):
    """`kept` as i64[4], for `load_kept`."""
    low, high, near, expected = kept
    tl.store(p_kept, low)
    tl.store(p_kept + 1, high)
    tl.store(p_kept + 2, near)
    tl.store(p_kept + 3, order_of(expected).to(tl.int64))


@triton.jit
def load_kept(p_kept):
    expected = value_of(tl.load(p_kept + 3).to(tl.int32))
    return tl.load(p_kept), tl.load(p_kept + 1), tl.load(p_kept + 2), expected


@triton.jit
def key_value(key):
    """The f32 of a `key_of`."""
    return value_of(((key >> ID_BITS) - SIGN).to(tl.int32))


@triton.jit
def key_id(key):
    """The i32 of a `key_of`."""
    return (key & NO_ID).to(tl.int32) ^ NO_ID
