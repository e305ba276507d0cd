"""What a scheduler costs the host: each function drives one, and gives microseconds.

The least of several repetitions: others on the machine only ever add. perf/scheduler_bench.py asks
for them, of ours and of its peers.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean, median

import numpy as np

from millrace.perf.scheduler_driver import (
    BLOCK_SIZE,
    MakeDriver,
    Prompt,
    SchedulerDriver,
    Size,
    timed,
)
from millrace.scheduler.prefix_cache import Chain, PrefixCache

PROMPT = 512  # tokens of those that decode; less one a request, so that they cross at all steps
OUTPUT = 1200
CONTEXT = 4096
STEP_TOKENS = 16_384
LONG_PROMPT = 100_000
WINDOWS, LEAST_WINDOWS = 60, 3
WINDOW = 16  # steps: every slot begins a block once, and what is put off is done once
SECONDS = 4.0  # after which no window begins
REPEATS = 24


def prompt_of(length: int, seed: int) -> Prompt:
    """A prompt unlike that of any other seed."""
    return np.random.default_rng(seed).integers(0, 30_000, length, dtype=np.int32)


def decoding(make: MakeDriver, slots: int, running: int, kv_tokens: int) -> SchedulerDriver:
    """A scheduler in which so many decode, and no prompt is left to compute."""
    driver = make(Size(slots, CONTEXT, max(STEP_TOKENS, slots), kv_tokens))
    for index in range(running):
        driver.submit(prompt_of(PROMPT - index % BLOCK_SIZE, seed=index), OUTPUT)
    driver.step()
    while driver.num_drawn < running:
        driver.step()
    return driver


def steady_step(make: MakeDriver, running: int, waiting: int = 0) -> float:
    """A step in which every slot is taken and decodes; crossings are a sixteenth of them."""
    driver = decoding(make, running, running, running * (PROMPT + OUTPUT + BLOCK_SIZE))
    for index in range(waiting):
        driver.submit(prompt_of(64, seed=index), 16)
    return _us(_windows(driver.step))


def _windows(step: Callable[[], int]) -> Iterable[float]:
    """Means over WINDOW steps, so that nothing that is put off to a later step is left out."""
    began = time.perf_counter()
    for index in range(1 + WINDOWS):
        window = mean(step() for _ in range(WINDOW))
        if index > 0:  # the first one warms up
            yield window
        if index >= LEAST_WINDOWS and time.perf_counter() - began > SECONDS:
            return


def prompt_comes(make: MakeDriver, length: int) -> float:
    """From a request's submission to its first token, as the only one, with nothing cached."""
    repeats = max(LEAST_WINDOWS, min(REPEATS, 2**18 // length))
    context = length + 4 * BLOCK_SIZE
    driver = make(Size(4, context, context, 2 * (repeats + 1) * context))
    samples = []
    for index in range(1 + repeats):
        samples.append(driver.submit(prompt_of(length, seed=index), 2) + driver.step())
        driver.step()
    return _us(samples[1:])


def comes_or_goes(make: MakeDriver, does_come: bool) -> float:
    """What a step of 128 costs more in which a request of 1k tokens comes, or goes."""
    decodes, length = 128, 1024
    driver = decoding(make, 2 * decodes, decodes, (decodes + 4 * REPEATS) * 2 * (PROMPT + OUTPUT))
    plain, come, go = [], [], []
    for index in range(4 * REPEATS):
        plain.append(driver.step())
        submitted = driver.submit(prompt_of(length, seed=10_000 + index), 2)
        come.append(submitted + driver.step())
        go.append(driver.step())  # draws its second and last token
    return _us(come if does_come else go) - _us(plain)


def cancel_waiting(make: MakeDriver, waiting: int) -> float:
    """One of many that wait, in no order: the median, since where it stands may matter."""
    driver = decoding(make, 1, 1, CONTEXT)
    for index in range(waiting):
        driver.submit(prompt_of(16, seed=index), 16)
    order = np.random.default_rng(0).permutation(waiting)[: waiting // 4] + 1
    return _us((driver.cancel(number) for number in order.tolist()), median)


def _us(samples_ns: Iterable[float], of_all: Callable[[Iterable[float]], float] = min) -> float:
    """Garbage is collected before, not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        return of_all(samples_ns) / 1000
    finally:
        gc.enable()


# ---------------------------------------------------------------- of ours alone


def index_long_prompt(_: MakeDriver) -> float:
    """The prefix cache takes in 6250 blocks of one prompt."""
    prompt, table = prompt_of(LONG_PROMPT, 1), np.arange(LONG_PROMPT // BLOCK_SIZE, dtype=np.int32)
    caches = [PrefixCache(BLOCK_SIZE, len(table)) for _ in range(REPEATS)]
    return _us(timed(partial(cache.insert, prompt, table, Chain()))[1] for cache in caches)


def look_up_long_prompt(_: MakeDriver) -> float:
    """All of them, found."""
    prompt, table = prompt_of(LONG_PROMPT, 1), np.arange(LONG_PROMPT // BLOCK_SIZE, dtype=np.int32)
    cache = PrefixCache(BLOCK_SIZE, len(table))
    cache.insert(prompt, table, Chain())
    return _us(timed(partial(cache.match, prompt))[1] for _ in range(REPEATS))


def yardstick(_: MakeDriver) -> float:
    """How fast is Python here, today?"""

    def insert() -> None:
        found: dict[tuple[int, bytes], int] = {}
        for number in range(LONG_PROMPT // BLOCK_SIZE):
            found.setdefault((number, number.to_bytes(4 * BLOCK_SIZE)), number)

    return _us(timed(insert)[1] for _ in range(REPEATS))
