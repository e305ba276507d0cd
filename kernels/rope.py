"""The table of rotation angles for RoPE: cosines and sines of every position, made once per model.

    frequency[i] = theta ** (-2i / D),  i in [0, D/2)        angle(p, i) = p * frequency[i]

Su et al., "RoFormer" (2021), in float32 as transformers computes it. The scalings below stretch the
frequencies for contexts longer than the model was trained on; `kernels/kv_append.py` applies them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the frequencies are stretched; each kind reads the fields named in its line.

    linear   frequency / factor                     Position interpolation, Chen et al. 2023
    factors  frequency[i] / factors[i]              GGUF's `rope_freqs`: D/2 divisors
    llama3   by wavelength w = 2 pi / frequency, against L = original_max_position (Llama 3.1):
             w < L / high_freq_factor  kept
             w > L / low_freq_factor   frequency / factor
             between                   (1 - s) * frequency / factor + s * frequency,
                                       s = (L / w - low_freq_factor) / (high - low)
    yarn     by index i, between those whose frequency turns beta_fast and beta_slow times within L
             (whole indices if truncate), from kept to frequency / factor along a straight line;
             cosines and sines times attention_factor    YaRN, Peng et al. 2023
    """

    kind: Literal["linear", "factors", "llama3", "yarn"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # `yarn_attention_factor`, or what the model's author chose


def rope_table(
    head_dim: int,
    max_position: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """cos_sin f32 [max_position, head_dim]: D/2 cosines, then D/2 sines, of each position.

    ValueError where a size is not positive, head_dim is odd, or the scaling is out of range.
    """
    frequencies = rope_frequencies(head_dim, theta, scaling)
    if max_position < 1:
        raise ValueError(f"max_position: expected at least 1, got {max_position}")
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    if scaling is not None and scaling.kind == "yarn":
        table *= _positive("scaling.attention_factor", scaling.attention_factor)
    return table.to(device)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """The D/2 angular frequencies, radians per position, f32, scaled."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected a positive even number, got {head_dim}")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"theta: expected a positive finite number, got {theta}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / _positive("scaling.factor", scaling.factor)
    if scaling.kind == "factors":
        return frequencies / _checked_factors(scaling.factors, head_dim // 2)
    if scaling.kind == "llama3":
        return _scale_llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _scale_yarn(frequencies, head_dim, theta, scaling)
    raise ValueError(
        f"scaling.kind: expected linear, factors, llama3 or yarn, got {scaling.kind!r}"
    )


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What YaRN multiplies cosines and sines by, so that attention is as sharp as before.

    0.1 ln(factor) + 1, as the paper found. DeepSeek's models name two weights of the logarithm
    instead, and the quotient of both is taken.
    """

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return sharpness(mscale) / sharpness(mscale_all_dim)
    return sharpness(1.0)


def _scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    factor = _positive("scaling.factor", scaling.factor)
    low = _positive("scaling.low_freq_factor", scaling.low_freq_factor)
    high = _positive("scaling.high_freq_factor", scaling.high_freq_factor)
    length = _positive("scaling.original_max_position", scaling.original_max_position)
    if high <= low:
        raise ValueError(f"scaling.high_freq_factor: expected more than {low} (low), got {high}")
    wavelength = 2 * math.pi / frequencies
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > length / low, frequencies / factor, between)
    return torch.where(wavelength < length / high, frequencies, scaled)


def _scale_yarn(frequencies: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    factor = _positive("scaling.factor", scaling.factor)
    length = _positive("scaling.original_max_position", scaling.original_max_position)
    fast = _positive("scaling.beta_fast", scaling.beta_fast)
    slow = _positive("scaling.beta_slow", scaling.beta_slow)
    if fast < slow:
        raise ValueError(f"scaling.beta_fast: expected at least {slow} (beta_slow), got {fast}")
    if theta <= 1:
        raise ValueError(f"theta: yarn expects more than 1, got {theta}")

    def index_that_turns(times: float) -> float:
        """i at which `length` positions turn `times` times: length * theta^(-2i / D) = 2 pi n."""
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_that_turns(fast), index_that_turns(slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a step, where both are the same index
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def _checked_factors(factors: tuple[float, ...], expected: int) -> Tensor:
    if len(factors) != expected:
        raise ValueError(f"scaling.factors: expected {expected} (head_dim / 2), got {len(factors)}")
    return torch.tensor([_positive("scaling.factors", f) for f in factors], dtype=torch.float32)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return value
