"""Scenario: a simulated world's limits, load and misfortunes, all drawn by seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from millrace.perf.sim.script import VOCAB, Script
from millrace.scheduler.policies import make_policy
from millrace.scheduler.policy import Policy
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Limits

POLICIES = ["first_come", "first_come", "priority", "fair_share", "deadline"]
AGING_S = 5.0
TURNS_TO_FIRST_TOKEN = 2.0
A_STEP_S, A_TOKEN_S = 1.0, 0.1  # what the cost model is told


def policy_of(name: str, limits: Limits) -> Policy:
    """A device's turn is a second, whatever it computes."""
    return make_policy(name, limits.max_running, AGING_S, lambda request: TURNS_TO_FIRST_TOKEN)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Small numbers make everything happen: full slots, full pools, hits, preemptions."""

    limits: Limits
    steps_in_flight: int
    num_requests: int
    max_prompt: int
    max_tokens: int
    prefixes: list[list[int]]  # prompts begin like one of these
    tenants: list[str]
    policy: str
    # Chances, by request:
    deadline: float
    sibling: float  # has the request before it for a leader
    stop: float
    failure: float
    # Chances, by turn:
    arrival: float
    cancel: float
    abandon: float
    lag: float  # a result stays in flight though it could be taken in


def draw_scenario(rng: Random, max_requests: int) -> Scenario:
    """A world of up to `max_requests` requests."""
    block_size = rng.choice([1, 2, 3, 4])
    is_tight = rng.random() < 0.3  # many long answers, and memory for hardly more than one
    max_running = 6 if is_tight else rng.randint(1, 6)
    max_prompt, max_tokens = rng.randint(1, 20), 16 if is_tight else rng.randint(1, 16)
    longest = -(-(max_prompt + max_tokens) // block_size)
    window = rng.choice([None, None, None, 1, 3, 7])
    fewest = longest * 3 // 4 if window is None else longest // 3
    most = longest + 2 if is_tight else longest * 3 // 2
    limits = Limits(
        num_blocks=rng.randint(max(1, fewest), most),
        block_size=block_size,
        max_running=max_running,
        max_step_tokens=rng.randint(max_running, max_running + 20),
        max_waiting=rng.choice([3, 100, 100]),
        max_waiting_tokens=rng.choice([40, 10_000, 10_000]),
        max_context=None if window is None else max_prompt + max_tokens,
        prefix_caching=rng.random() < 0.8,
        host_blocks=rng.choice([0, 4, 100, 100]),
        block_copy_s=rng.choice([0.0, 0.0, A_TOKEN_S]),
        window=window,
    )
    policy = rng.choice(POLICIES)
    return Scenario(
        limits,
        steps_in_flight=rng.randint(1, 3),
        num_requests=rng.randint(1, max_requests),
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        prefixes=[_tokens(rng, rng.randint(1, max_prompt)) for _ in range(2)],
        policy=policy,
        tenants=rng.choice([[""], ["a", "b"]]),
        deadline=0.6 if policy == "deadline" else rng.choice([0.0, 0.2]),
        sibling=rng.choice([0.0, 0.3]),
        stop=rng.choice([0.0, 0.5]),
        failure=rng.choice([0.0, 0.2]),
        arrival=0.9 if is_tight else rng.choice([0.1, 0.5, 0.9]),
        cancel=0.0 if is_tight else rng.choice([0.0, 0.05, 0.3]),
        abandon=rng.choice([0.0, 0.0, 0.02]),
        lag=rng.choice([0.0, 0.5]),
    )


def draw_request(rng: Random, scenario: Scenario, request_id: int, now_s: float) -> Request:
    """Prompts, seeds and lengths repeat, so that prefixes of prompt and output are shared."""
    prompt = list(rng.choice(scenario.prefixes))
    if rng.random() < 0.7:
        prompt += _tokens(rng, rng.randint(0, scenario.max_prompt - len(prompt)))
    max_tokens = rng.randint(1, scenario.max_tokens)
    script = Script(
        seed=rng.randint(0, 1),
        stop_tokens=frozenset([0] if rng.random() < scenario.stop else []),
        fails_at=rng.randrange(max_tokens) if rng.random() < scenario.failure else None,
    )
    return Request(
        id=request_id,
        prompt=np.asarray(prompt, np.int32),
        max_tokens=max_tokens,
        payload=script,
        deadline_s=now_s + rng.randint(0, 30) if rng.random() < scenario.deadline else None,
        arrived_s=now_s,
        priority=rng.randint(0, 2),
        tenant=rng.choice(scenario.tenants),
        weight=rng.choice([1.0, 1.0, 3.0]),
        leader=request_id - 1 if rng.random() < scenario.sibling else None,
        read_cache=rng.random() < 0.9,
    )


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]
