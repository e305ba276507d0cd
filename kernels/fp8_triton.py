"""float32 to e4m3 in Triton, in integers: the same bits on every GPU and in the interpreter.

A GPU older than sm_89 has no instruction for it, and the interpreter's own cast loses the carry
from the mantissa into the exponent. An e4m3 number has 4 bits of exponent (bias 7) and 3 of
mantissa, its largest value is 448, and below 2^-6 its steps are 2^-9.
"""

import triton
import triton.language as tl

_FP8_MAX = tl.constexpr(448.0)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMAL_SHIFT = tl.constexpr(2.0**14)  # float32 has steps of 2^-9 here
_DROPPED_BITS = tl.constexpr(23 - 3)
_BELOW_HALF = tl.constexpr((1 << (23 - 3 - 1)) - 1)  # of a step; half, if the last bit kept is odd
_BIAS_DIFFERENCE = tl.constexpr((127 - 7) << 3)
_NAN = tl.constexpr(0x7F)


@triton.jit
def encode_e4m3(b_x):
    """The bytes of the e4m3 numbers nearest to the float32 b_x, ties to even, beyond 448 saturated.

    A NaN stays one.
    """
    b_abs = tl.minimum(tl.abs(b_x), _FP8_MAX)
    b_bits = b_abs.to(tl.int32, bitcast=True)
    b_bits += _BELOW_HALF + ((b_bits >> _DROPPED_BITS) & 1)
    b_normal = (b_bits >> _DROPPED_BITS) - _BIAS_DIFFERENCE
    # Adding 2^14 rounds to its steps, which leaves the subnormal's mantissa in the lowest bits.
    b_subnormal = (b_abs + _SUBNORMAL_SHIFT).to(tl.int32, bitcast=True) & 0xF
    b_code = tl.where(b_abs < _SMALLEST_NORMAL, b_subnormal, b_normal)
    b_code = tl.where(b_x != b_x, _NAN, b_code)
    b_sign = (b_x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (b_code | b_sign).to(tl.uint8)
