"""How much a server can carry: the rate at which enough requests still meet both objectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.perf.capacity.latencies import Objectives, Quantiles
from millrace.perf.capacity.virtual import VirtualServer
from millrace.perf.capacity.workload import Workload

PRECISION = 1.02  # the rate that is found, and the first one too high, differ by 2 %
AT_ONCE = 1e9  # requests a second
LEAST_RATE = 1e-3  # requests a second: what fails at this one fails for a request alone
CURVE = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the attainable rate


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rate gives."""

    rate: float  # requests a second that come
    attainment: float  # share that met both objectives
    goodput: float  # requests a second that did
    ttft_s: Quantiles
    itl_s: Quantiles  # of single gaps between tokens
    tokens_per_s: float
    running_mean: float
    running_p95: float
    kv_mean: float  # share of the cache that requests held
    kv_p95: float
    refused: int
    preemptions: int
    swapped_blocks: int  # to the host and back


@dataclass(frozen=True, slots=True)
class Question:
    """A server, what it is asked for, and what is promised to those who ask."""

    server: VirtualServer
    workload: Workload
    objectives: Objectives
    attain: float  # share of requests that must meet both

    def at(self, rate: float) -> Answer:
        """Offer this rate."""
        run = self.server.run(self.workload.requests(rate))
        attainment = run.latencies.attainment(self.objectives)
        num_blocks = run.scheduler.limits.num_blocks
        return Answer(
            rate,
            attainment,
            rate * attainment,
            run.latencies.ttft(),
            run.latencies.itl(),
            run.latencies.tokens_per_s,
            run.mean(run.running),
            run.p95(run.running),
            run.mean(run.blocks) / num_blocks,
            run.p95(run.blocks) / num_blocks,
            run.refused,
            run.scheduler.counters.preemptions,
            run.swapped_blocks,
        )

    def attainable_rate(self) -> float:
        """The highest rate with enough good requests, to within PRECISION; 0: there is none.

        No more than can be sustained: a few requests may all be in time though far too many come,
        if they are over before the queue has grown.
        """
        low = high = self.sustained_rate()
        while not self._is_met(low):
            high, low = low, low / 2.0
            if low < LEAST_RATE:
                return 0.0
        while high / low > PRECISION:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._is_met(middle) else (low, middle)
        return low

    def sustained_rate(self) -> float:
        """Requests a second that a server gets done which never lacks any."""
        latencies = self.server.run(self.workload.requests(AT_ONCE)).latencies
        return float(latencies.is_whole.sum() / np.nanmax(latencies.last_s))

    def curve(self, attainable: float) -> list[Answer]:
        """From a light load to twice what is attainable."""
        return [self.at(share * attainable) for share in CURVE]

    def _is_met(self, rate: float) -> bool:
        return self.at(rate).attainment >= self.attain
