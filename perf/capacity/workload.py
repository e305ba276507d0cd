"""Workload: what is asked of a server, drawn once from a seed, and offered at any rate.

Requests, lengths and the gaps between arrivals in units of their mean are the same at every rate
(common random numbers): two rates then differ by the rate alone, and a bisection sees no noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np

from millrace.perf.sim.traffic import Lengths, gap_s
from millrace.scheduler.request import Request


@dataclass(frozen=True)
class Workload:
    """`count` requests in all; each prompt is its own but for `shared_prefix` first tokens."""

    prompt: Lengths
    output: Lengths
    gap_cv: float
    count: int
    longest: int  # tokens of prompt and output; longer ones are cut to it
    shared_prefix: int = 0
    seed: int = 0

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, output) tokens of each request."""
        rng, found = Random(self.seed), []
        for _ in range(self.count):
            prompt = self.prompt.draw(rng, self.longest - 1)
            found.append((prompt, self.output.draw(rng, self.longest - prompt)))
        return found

    @cached_property
    def unit_arrivals(self) -> np.ndarray:
        """When each comes, at a rate of one a second."""
        rng = Random(self.seed + 1)
        return np.cumsum([gap_s(rng, 1.0, self.gap_cv) for _ in range(self.count)])

    def requests(self, rate: float) -> list[Request]:
        """In order of arrival, from a little after 0 s. A prompt is the request's number, said
        again and again: the prefix cache finds nothing in another's."""
        found = []
        for index, (prompt_tokens, output_tokens) in enumerate(self.lengths):
            prompt = np.full(prompt_tokens, index + 1, np.int32)
            prompt[: self.shared_prefix] = 0
            arrived_s = float(self.unit_arrivals[index]) / rate
            found.append(Request(index, prompt, output_tokens, arrived_s=arrived_s))
        return found
