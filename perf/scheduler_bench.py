"""What the scheduler costs the host, without a model; beside vLLM's where that is installed.

    python -m millrace.perf.scheduler_bench [--json FILE]

Every figure is the median over many repetitions on one core. The device is a fabricated result that
costs nothing and is not timed. The machine's speed is in every figure: compare ratios of one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from millrace.perf.environment import environment
from millrace.perf.peers import vllm_scheduler
from millrace.scheduler.admission import Accepted
from millrace.scheduler.plan import StepPlan, StepResult
from millrace.scheduler.prefix_cache import Chain, PrefixCache
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler

BLOCK_SIZE = 16
PROMPT = 512  # tokens of those that decode; less one a request, so that they cross at all steps
OUTPUT = 3000
CONTEXT = 4096
RUNNING = (1, 64, 256, 1024, 4096)
WAITING = 10_000
STEPS, WARM_UP_STEPS = 300, 20
LONG_PROMPT = 100_000
GOALS_US = {
    "step, 256 decode": 25,
    "step, 4096 decode": 100,
    "admit 1k tokens": 60,
    "release 1k tokens": 60,
    "index 100k tokens": 3000,
    "look up 100k tokens": 300,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    us: float
    goal_us: float | None


def tokens(count: int, seed: int) -> npt.NDArray[np.int32]:
    """A prompt unlike that of any other seed."""
    return np.random.default_rng(seed).integers(0, 30_000, count, dtype=np.int32)


class Driver:
    """A scheduler whose steps are answered at once with the same token for everyone."""

    def __init__(self, max_running: int, num_decodes: int) -> None:
        blocks = (num_decodes + 64) * (PROMPT + OUTPUT) // BLOCK_SIZE
        step_tokens = max(16_384, max_running)
        self.scheduler = Scheduler(
            Limits(blocks, BLOCK_SIZE, max_running, step_tokens, 20_000, 10**9, CONTEXT)
        )
        self._decodes = np.zeros(max_running, np.bool_)
        self._decode_slots = self._decodes.nonzero()[0]
        for index in range(num_decodes):
            prompt = tokens(PROMPT - index % BLOCK_SIZE, seed=index)
            self.submit(Request(index, prompt, OUTPUT))
        while self.scheduler.num_waiting or self.scheduler._prefilling:
            self.step()

    def submit(self, request: Request) -> None:
        decision = self.scheduler.submit(request)
        assert isinstance(decision, Accepted), decision

    def step(self) -> tuple[int, int]:
        """Nanoseconds of schedule() and of apply()."""
        began = time.perf_counter_ns()
        plan = self.scheduler.schedule()
        planned = time.perf_counter_ns()
        assert plan is not None, "there is work"
        result = self._result(plan)
        answered = time.perf_counter_ns()
        self.scheduler.apply(result)
        return planned - began, time.perf_counter_ns() - answered

    def _result(self, plan: StepPlan) -> StepResult:
        if plan.decode_leaves or plan.decode_joins:
            self._decodes[plan.decode_leaves] = False
            self._decodes[plan.decode_joins] = True
            self._decode_slots = self._decodes.nonzero()[0]
        slots, ended = self._decode_slots, [chunk.slot for chunk in plan.prefill if chunk.samples]
        if ended:
            slots = np.concatenate([slots, np.array(ended, np.int64)])
        count = len(slots)
        none, every = np.zeros(count, np.bool_), np.ones(count, np.bool_)
        return StepResult(plan.step, slots, np.full(count, 7), none, every)


def steady_step(num_decodes: int, num_waiting: int = 0) -> float:
    """A step in which every slot is taken and decodes; crossings are a sixteenth of them."""
    driver = Driver(num_decodes, num_decodes)
    for index in range(num_waiting):
        driver.submit(Request(num_decodes + index, tokens(64, seed=index), 16))
    return _median_us(sum(driver.step()) for _ in range(WARM_UP_STEPS + STEPS))


def admit_and_release() -> dict[str, float]:
    """What a step costs more in which a request of 1k tokens comes, or goes. Nothing is cached."""
    driver = Driver(256, num_decodes=128)
    plain, admit, release = [], [], []
    for index in range(WARM_UP_STEPS + STEPS):
        plain.append(sum(driver.step()))
        request = Request(10_000 + index, tokens(1024, seed=10_000 + index), 2)
        began = time.perf_counter_ns()
        driver.submit(request)
        submitted = time.perf_counter_ns() - began
        admit.append(submitted + sum(driver.step()))
        release.append(sum(driver.step()))  # draws its second and last token
    step = _median_us(plain)
    return {
        "admit 1k tokens": _median_us(admit) - step,
        "release 1k tokens": _median_us(release) - step,
    }


def long_prompt() -> dict[str, float]:
    """The prefix cache alone, with 6250 blocks of one prompt."""
    prompt = tokens(LONG_PROMPT, seed=1)
    table = np.arange(LONG_PROMPT // BLOCK_SIZE, dtype=np.int32)
    index, look_up = [], []
    for _ in range(WARM_UP_STEPS + 30):
        cache = PrefixCache(BLOCK_SIZE, len(table))
        index.append(_ns(lambda: cache.insert(prompt, table, Chain())))  # noqa: B023
        look_up.append(_ns(lambda: cache.match(prompt)))  # noqa: B023
        assert len(cache.match(prompt)) == len(table)
    return {
        "index 100k tokens": _median_us(index),
        "look up 100k tokens": _median_us(look_up),
        "yardstick: 6250 dict insertions": _median_us(_ns(yardstick) for _ in range(STEPS)),
    }


def yardstick() -> None:
    """How fast is Python here, today?"""
    found: dict[tuple[int, bytes], int] = {}
    for number in range(LONG_PROMPT // BLOCK_SIZE):
        found.setdefault((number, number.to_bytes(4 * BLOCK_SIZE)), number)


def cancel_waiting(num_waiting: int) -> float:
    """One of many that wait, in no order."""
    driver = Driver(1, num_decodes=1)
    for index in range(num_waiting):
        driver.submit(Request(1 + index, tokens(16, seed=index), 16))
    order = np.random.default_rng(0).permutation(num_waiting)[: num_waiting // 4] + 1
    cancel = driver.scheduler.finish
    return _median_us(_ns(lambda: cancel(i, Finish.CANCELLED)) for i in order.tolist())  # noqa: B023


def measure() -> list[Figure]:
    """Ours, in the order of the table."""
    us = {f"step, {n} decode": steady_step(n) for n in RUNNING}
    us[f"step, 256 decode, {WAITING} wait"] = steady_step(256, WAITING)
    us |= admit_and_release()
    us |= long_prompt()
    us[f"cancel one of {WAITING // 100} waiting"] = cancel_waiting(WAITING // 100)
    us[f"cancel one of {WAITING} waiting"] = cancel_waiting(WAITING)
    return [Figure(name, value, GOALS_US.get(name)) for name, value in us.items()]


def _ns(work: Callable[[], object]) -> int:
    began = time.thread_time_ns()  # of the CPU: long enough that others would get in between
    work()
    return time.thread_time_ns() - began


def _median_us(samples_ns: Iterable[int]) -> float:
    """Median without the first ones; garbage is collected before, not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        taken = list(samples_ns)
    finally:
        gc.enable()
    return median(taken[min(WARM_UP_STEPS, len(taken) // 2) :]) / 1000


def _table(figures: list[Figure], peer: dict[str, float]) -> Table:
    table = Table("microseconds, median", box=box.SIMPLE)
    for heading in ("Millrace", "goal", "vLLM", "vLLM / Millrace"):
        table.add_column(heading, justify="right")
    for figure in figures:
        theirs = peer.get(figure.name)
        table.add_row(
            figure.name,
            f"{figure.us:,.1f}",
            "" if figure.goal_us is None else f"{figure.goal_us:,.0f}",
            "" if theirs is None else f"{theirs:,.1f}",
            "" if theirs is None else f"{theirs / figure.us:,.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    found_at = environment(seed=0)
    figures = measure()
    peer = vllm_scheduler.measure(RUNNING, PROMPT)
    theirs = peer if isinstance(peer, dict) else {}
    Console().print(_table(figures, theirs))
    if isinstance(peer, str):
        print(f"vLLM is left out: {peer}")
    result = {"environment": found_at, "figures": [asdict(f) for f in figures], "vllm": peer}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
