"""Scenario: a simulated world's limits, load and misfortunes, all drawn by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from millrace.perf.sim.device import Roughness
from millrace.perf.sim.load import Load
from millrace.perf.sim.script import VOCAB, Script
from millrace.perf.sim.traffic import AZURE_CODE_GAP_CV, TRACES, Lengths, Shape
from millrace.scheduler.policies import make_policy
from millrace.scheduler.policy import Policy
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Limits

POLICIES = ["first_come", "first_come", "priority", "fair_share", "deadline"]
TENANTS = [[""], ["a", "b"], ["a", "b", "c", "d"], ["a"] * 9 + ["b"]]  # the last: a greedy one
AGING_S = 5.0
FIRST_TOKEN_S = 2.0
STEP_S, TOKEN_S, CONTEXT_TOKEN_S = 0.5, 0.05, 0.002  # of the device: weights, rows, KV
GAP_CVS = [1.0, *(shape.gap_cv for shape in TRACES.values()), AZURE_CODE_GAP_CV]
MANY = 1000  # requests: a world of more lasts, and is not all crowd
A_STEP_S, A_TOKEN_S = 1.0, 0.1  # what the cost model is told


def policy_of(name: str, limits: Limits) -> Policy:
    """The shedding policy expects every first token at the same time."""
    return make_policy(name, limits.max_running, AGING_S, lambda request: FIRST_TOKEN_S)


def step_cost_s(load: Load) -> float:
    """A small roofline: a step is bound by what it reads, or by the rows that it computes."""
    read = load.context_tokens + load.prefill_context_tokens
    return max(STEP_S + CONTEXT_TOKEN_S * read, TOKEN_S * load.tokens)


@dataclass(frozen=True, slots=True)
class Turn:
    """A session's next request."""

    history: list[int]  # prompt and answer so far
    tenant: str
    room: int  # new tokens at most, >= 1


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
    trace: Shape | None  # whose lengths these are, scaled down; None: any length is as likely
    mean_gap_s: float
    gap_cv: float
    roughness: Roughness
    # Chances, by request:
    session: float  # comes back with another turn
    deadline: float
    sibling: float  # has the request before it for a leader
    stop: float
    failure: float
    lookahead: float  # drafts its next tokens
    # Chances, by turn:
    cancel: float
    disconnect: float  # several are cancelled at once
    abandon: float
    clock_jump: float
    lag: float  # a result stays in flight though it could be taken in


def draw_scenario(rng: Random, max_requests: int) -> Scenario:
    """A world of up to `max_requests` requests; of exactly so many where they are many."""
    block_size = rng.choice([1, 2, 3, 4])
    is_tight = rng.random() < 0.3  # many long answers, and memory for hardly more than one
    max_running = 6 if is_tight else rng.randint(1, 6)
    max_prompt, max_tokens = rng.randint(1, 20), 16 if is_tight else rng.randint(1, 16)
    session = rng.choice([0.0, 0.0, 0.8])
    if session:  # prompts grow by what was answered
        max_prompt += 2 * max_tokens
    # Requests a second that come, over those that can be served, roughly.
    loads = [0.3, 0.9, 1.5] if max_requests >= MANY else [0.3, 1.0, 10.0]
    load = loads[-1] if is_tight else rng.choice(loads)
    load *= 0.2 if session else 1.0  # each of them comes back
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
        num_requests=max_requests if max_requests >= MANY else rng.randint(1, max_requests),
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        prefixes=[_tokens(rng, rng.randint(1, max_prompt)) for _ in range(2)],
        policy=policy,
        tenants=rng.choice(TENANTS),
        trace=rng.choice([None, None, *TRACES.values()]),
        mean_gap_s=STEP_S * max_tokens / (2 * max_running * load),
        gap_cv=rng.choice(GAP_CVS),
        roughness=rng.choice([Roughness(), Roughness(0.3, 0.02, 20.0)]),
        session=session,
        deadline=0.6 if policy == "deadline" else rng.choice([0.0, 0.2]),
        sibling=rng.choice([0.0, 0.3]),
        stop=rng.choice([0.0, 0.5]),
        failure=rng.choice([0.0, 0.2]),
        lookahead=rng.choice([0.0, 0.0, 0.5, 1.0]),
        cancel=0.0 if is_tight else rng.choice([0.0, 0.05, 0.3]),
        disconnect=rng.choice([0.0, 0.0, 0.02]),
        abandon=rng.choice([0.0, 0.0, 0.02]),
        clock_jump=rng.choice([0.0, 0.0, 0.0, 0.02]),
        lag=rng.choice([0.0, 0.5]),
    )


def draw_request(
    rng: Random, scenario: Scenario, request_id: int, now_s: float, turn: Turn | None = None
) -> Request:
    """Prompts, seeds and lengths repeat, so that prefixes of prompt and output are shared."""
    prompt = _first_prompt(rng, scenario) if turn is None else _next_prompt(rng, turn)
    trace = scenario.trace
    max_tokens = _length(rng, scenario.max_tokens, trace.output if trace is not None else None)
    script = Script(
        seed=rng.randint(0, 1),
        stop_tokens=frozenset([0] if rng.random() < scenario.stop else []),
        fails_at=rng.randrange(max_tokens) if rng.random() < scenario.failure else None,
        luck=rng.choice([0, 50, 90, 100]),
    )
    return Request(
        id=request_id,
        prompt=np.asarray(prompt, np.int32),
        max_tokens=max_tokens,
        payload=script,
        deadline_s=now_s + rng.randint(0, 30) if rng.random() < scenario.deadline else None,
        arrived_s=now_s,
        priority=rng.randint(0, 2),
        tenant=rng.choice(scenario.tenants) if turn is None else turn.tenant,
        weight=rng.choice([1.0, 1.0, 3.0]),
        leader=request_id - 1 if rng.random() < scenario.sibling else None,
        read_cache=rng.random() < 0.9,
        lookahead=rng.randint(1, 5) if rng.random() < scenario.lookahead else 0,
    )


def _first_prompt(rng: Random, scenario: Scenario) -> list[int]:
    prompt = list(rng.choice(scenario.prefixes))
    if rng.random() < 0.7:
        trace = scenario.trace
        if trace is None:
            length = rng.randint(len(prompt), scenario.max_prompt)
        else:
            length = _length(rng, scenario.max_prompt, trace.prompt)
        prompt = prompt[:length] + _tokens(rng, max(0, length - len(prompt)))
    return prompt


def _next_prompt(rng: Random, turn: Turn) -> list[int]:
    return turn.history + _tokens(rng, rng.randint(1, min(4, turn.room)))


def _length(rng: Random, longest: int, lengths: Lengths | None) -> int:
    """A trace's lengths are scaled so that the median is a third of the longest."""
    if lengths is None:
        return rng.randint(1, longest)
    return lengths.draw(rng, longest, longest / (3 * math.exp(lengths.mu)))


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]
