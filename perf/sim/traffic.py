"""Traffic: how long requests are and when they come, in the shapes of published traces.

Lengths are lognormal, gaps between arrivals gamma distributed. The parameters were fitted to the
public files, by the moments of the logarithms and, for the gaps, by maximum likelihood:

    azure-code               Patel et al., "Splitwise", ISCA 2024: 8,819 requests
    azure-conversation       the same: 19,366 requests
    mooncake-conversation    Qin et al., "Mooncake", FAST 2025: 12,031 requests

Prompt and output lengths of a request are drawn independently: their logarithms correlate by less
than 0.1 in the traces. The fits are of the whole files, and say nothing of how a day goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: exp of a normal distribution; `sigma` 0 means that all are alike."""

    mu: float
    sigma: float

    @classmethod
    def fixed(cls, tokens: int) -> Lengths:
        return cls(math.log(tokens), 0.0)

    def draw(self, rng: Random, limit: int, scale: float = 1.0) -> int:
        """A length of 1 to `limit` tokens; `scale` makes a small world of a large one."""
        drawn = rng.lognormvariate(self.mu, self.sigma)
        return max(1, round(min(limit, scale * drawn)))

    @property
    def mean(self) -> float:
        """Of the distribution, before lengths are cut to a limit."""
        return math.exp(self.mu + self.sigma**2 / 2)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the requests of a trace are like."""

    prompt: Lengths
    output: Lengths
    gap_cv: float = 1.0  # standard deviation of the gaps over their mean; 1: a Poisson process


TRACES = {
    "azure-code": Shape(Lengths(7.00, 1.36), Lengths(2.79, 0.85), gap_cv=0.23**-0.5),
    "azure-conversation": Shape(Lengths(6.63, 0.99), Lengths(5.02, 0.86), gap_cv=0.86**-0.5),
    # Its times are rounded to seconds, so nothing is known of its gaps.
    "mooncake-conversation": Shape(Lengths(8.74, 1.20), Lengths(5.34, 1.36)),
}
AZURE_CODE_GAP_CV = 13.2  # as counted, without a fit: hundreds at once, then nothing for long


def gap_s(rng: Random, mean_s: float, cv: float) -> float:
    """Seconds to the next arrival: gamma distributed, exponential where `cv` is 1."""
    shape = cv**-2
    return rng.gammavariate(shape, mean_s / shape)
