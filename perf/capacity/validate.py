"""Is the planner right? Fit its cost model to a short run of the built-in model, then predict
another run and measure that one, too.

    python -m millrace.perf.capacity.validate --out perf/results/plan-validation.json

The engine's core runs in this process, without sockets, against the clock. The file that is written
can be given to `millrace plan --measured`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core, build_scheduler, limits_of
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import NewRequest, Ready, StepOutput
from millrace.engine.runner.sizes import sizes_for
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.weights.locate import resolve
from millrace.perf.capacity.cost import Measured, fit
from millrace.perf.capacity.latencies import Latencies, Objectives, Quantiles
from millrace.perf.capacity.search import Question
from millrace.perf.capacity.virtual import VirtualServer
from millrace.perf.capacity.workload import Workload
from millrace.perf.environment import environment
from millrace.perf.sim.load import Load
from millrace.perf.sim.traffic import Lengths
from millrace.scheduler.request import Request

BURSTS = (1, 2, 4, 8, 12, 16)  # requests at once, of the run that is fitted
PROMPT, OUTPUT = Lengths(4.0, 0.5), Lengths(3.0, 0.4)  # medians of 55 and 20 tokens
LONGEST = 512
UTILISATION = 0.6  # of what can be sustained: the rate that is predicted
SETTINGS: dict[str, Any] = {"max_running": 16, "threads": 1, "prefix_caching": False}


@dataclass(slots=True)
class RealRun:
    """Requests served by a real core: what each step was asked, and how long it took."""

    core: EngineCore
    vocab_size: int
    loads: list[Load] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _num_served: int = 0  # ids are not used again

    def serve(self, requests: Sequence[Request]) -> Latencies:
        """Offer these at their times, which begin now, and wait for the last to end."""
        latencies = Latencies([request.arrived_s for request in requests])
        prompts = np.array([len(request.prompt) for request in requests])
        began, num_sent = time.monotonic(), 0
        while num_sent < len(requests) or not self.core.is_idle:
            now_s = time.monotonic() - began
            while num_sent < len(requests) and requests[num_sent].arrived_s <= now_s:
                self._send(requests[num_sent], began)
                num_sent += 1
            if self.core.is_idle:
                time.sleep(max(0.0, requests[num_sent].arrived_s - now_s))
                continue
            decodes = (latencies.drawn > 0) & ~latencies.is_whole
            context = int((prompts + latencies.drawn)[decodes].sum())
            self._step(latencies, context, began)
        self._num_served += len(requests)
        return latencies

    def _send(self, request: Request, began: float) -> None:
        rng = np.random.default_rng([request.id, len(request.prompt)])
        prompt = rng.integers(3, self.vocab_size, len(request.prompt)).astype("<i4")
        params = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, seed=0)
        message = NewRequest(
            self._num_served + request.id,
            prompt.tobytes(),
            params,
            request.max_tokens,
            [],
            began + request.arrived_s,
        )
        self.core.handle(message)

    def _step(self, latencies: Latencies, context: int, began: float) -> None:
        before = time.perf_counter()
        outputs = [message for message in self.core.step() if isinstance(message, StepOutput)]
        seconds, now_s = time.perf_counter() - before, time.monotonic() - began
        for delta in outputs[-1].deltas:
            index = delta.id - self._num_served
            for _ in delta.token_ids:
                latencies.drew(np.array([index]), now_s)
            latencies.is_whole[index] = delta.finish == "length"
        stats = outputs[-1].stats
        if stats.step_s:
            load = Load(stats.prefill_tokens, stats.decode_tokens, 0, context, 0, 0)
            self.loads.append(load)
            self.seconds.append(seconds)


def calibrate(run: RealRun, seed: int) -> None:
    """Bursts of every size, so that the loads of all kinds of steps are seen."""
    for repeat in range(2):
        for burst in BURSTS:
            workload = Workload(PROMPT, OUTPUT, 1.0, burst, LONGEST, seed=seed + 100 * repeat)
            run.serve(workload.requests(rate=1e6))


def measured_by(run: RealRun, ready: Ready) -> Measured:
    """The fit of all steps so far."""
    costs_s, sigma = fit(run.loads, run.seconds)
    return Measured(
        ready.model,
        ready.device,
        ready.num_blocks,
        ready.block_size,
        ready.max_context,
        0,
        costs_s,
        sigma,
        len(run.loads),
    )


def figures(latencies: Latencies) -> dict[str, Any]:
    """In milliseconds."""

    def in_ms(spread: Quantiles) -> dict[str, float]:
        return {name: 1000 * value for name, value in asdict(spread).items()}

    return {
        "ttft_ms": in_ms(latencies.ttft()),
        "itl_ms": in_ms(latencies.itl()),
        "tokens_per_s": latencies.tokens_per_s,
    }


def compare(run: RealRun, server: VirtualServer, rate: float, count: int, seed: int) -> Any:
    """One run as predicted, and as measured, of the same requests at the same times."""
    workload = Workload(PROMPT, OUTPUT, 1.0, count, LONGEST, seed=seed)
    predicted = figures(server.run(workload.requests(rate)).latencies)
    measured = figures(run.serve(workload.requests(rate)))
    return {"seed": seed, "rate": rate, "predicted": predicted, "measured": measured}


def ratios(pairs: list[Any]) -> dict[str, float]:
    """Predicted over measured, the median of the repetitions."""
    found = {}
    for name, key in (("ttft_ms", "p50"), ("ttft_ms", "p95"), ("itl_ms", "p50"), ("itl_ms", "p95")):
        each = [pair["predicted"][name][key] / pair["measured"][name][key] for pair in pairs]
        found[f"{name} {key}"] = statistics.median(each)
    each = [p["predicted"]["tokens_per_s"] / p["measured"]["tokens_per_s"] for p in pairs]
    return found | {"tokens_per_s": statistics.median(each)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rate", type=float, help="requests a second (default: 60 %% of full)")
    parser.add_argument("--requests", type=int, default=60, help="of each repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    found_at = environment(args.seed)
    config = EngineConfig(**SETTINGS)
    core, ready = build_core(config, resolve(config.model, config.revision))
    run = RealRun(core, ready.vocab_size)
    run.serve(Workload(PROMPT, OUTPUT, 1.0, 2, LONGEST).requests(1e6))  # the first calls are slow
    run.loads.clear()
    run.seconds.clear()
    calibrate(run, args.seed)
    measured = measured_by(run, ready)
    sizes = sizes_for(config, torch.device(ready.device))
    limits = limits_of(config, sizes, ready.num_blocks, ready.max_context)
    server = VirtualServer(
        lambda: build_scheduler(config, limits),
        measured,
        measured.run_ahead,
        measured.roughness,
    )
    workload = Workload(PROMPT, OUTPUT, 1.0, args.requests, LONGEST, seed=args.seed)
    question = Question(server, workload, Objectives(1.0, 1.0), 0.99)
    rate = args.rate or UTILISATION * question.sustained_rate()
    seeds = range(args.seed, args.seed + args.repeats)
    pairs = [compare(run, server, rate, args.requests, seed) for seed in seeds]
    result = {
        "environment": found_at,
        "settings": SETTINGS,
        "measured": asdict(measured),
        "repetitions": pairs,
        "predicted_over_measured": ratios(pairs),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["predicted_over_measured"], indent=1))


if __name__ == "__main__":
    main()
