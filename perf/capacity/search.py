"""How much a server can carry: the rate at which enough requests still meet both objectives."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.perf.capacity.latencies import Objectives, Quantiles
from millrace.perf.capacity.virtual import VirtualServer
from millrace.perf.capacity.workload import Workload
from millrace.perf.sim.load import Load

PRECISION = 1.02  # the rate that is found, and the first one too high, differ by 2 %
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
        )

    def attainable_rate(self) -> float:
        """The highest rate with enough good requests, to within PRECISION; 0: there is none."""
        low = high = self.full_rate()
        if self._is_met(low):
            while self._is_met(high := 2.0 * low):
                low = high
        else:
            while not self._is_met(low := high / 2.0):
                high = low
                if low < LEAST_RATE:
                    return 0.0
        while high / low > PRECISION:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._is_met(middle) else (low, middle)
        return low

    def curve(self, attainable: float) -> list[Answer]:
        """From a light load to twice what is attainable."""
        return [self.at(share * attainable) for share in CURVE]

    def _is_met(self, rate: float) -> bool:
        return self.at(rate).attainment >= self.attain

    def full_rate(self) -> float:
        """Requests a second that full slots would carry: where the search begins."""
        lengths = self.workload.lengths
        prompt = sum(prompt for prompt, _ in lengths) / len(lengths)
        output = sum(output for _, output in lengths) / len(lengths)
        slots = self.server.make_scheduler().limits.max_running
        context = int(slots * (prompt + output / 2))
        step_s = self.server.cost(Load(0, slots, slots, context, 0, 0))
        empty_s = self.server.cost(Load(0, 0, 0, 0, 0, 0))
        prompt_s = self.server.cost(Load(int(prompt), 0, 1, 0, int(prompt), 0)) - empty_s
        return 1.0 / (output * step_s / slots + max(prompt_s, 0.0))
