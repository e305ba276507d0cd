"""A tenant of a few requests beside one of five hundred: what that costs it in time to first token.

    python -m millrace.perf.fairness --json perf/results/fairness.json
    python -m millrace.perf.fairness --small-prompt-tokens 96 --no-pauses   # see below

One server of the built-in model with `policy: fair_share`, real gRPC. The small tenant sends one
request after another: first with the server to itself, then beside the greedy tenant, whose
requests were all sent at once, then by itself again: a machine that warms up or slows down is in
both figures. The greedy tenant's rest is cancelled once the small one has what it asked for.

A request that comes finds a step under way, and waits for its end whatever the policy. So the
settings are those of somebody who cares for latency on a processor: a step computes few tokens, and
a prompt of the small tenant fills several, alone as well as beside others. For one that fits into
a single step, the half step of waiting alone would be half of the goal.

Without pauses the small tenant always has a request under way: it asks for as much as the greedy
one, and fair shares owe it no more than half of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from millrace.client import AsyncClient, AsyncConnection
from millrace.engine.errors import MillraceError
from millrace.perf.environment import environment
from millrace.perf.loadgen.drive import Run, closed_loop
from millrace.perf.loadgen.transport import GenerateSender
from millrace.perf.loadgen.workload import random_ids, random_requests
from millrace.perf.server_process import ServerProcess, metric
from millrace.v1 import admin_pb2
from millrace.v1 import inference_pb2 as pb

GOAL = 2.0  # times the time to first token that the small tenant has alone
SERVER = ("--policy", "fair_share", "--max-running", "4", "--max-step-tokens", "32")
GREEDY, SMALL = "greedy", "small"
SETTLED = 8  # greedy requests ended before the small tenant begins: the slots are full, the
# requests in them are of different ages, and the queue is long
ALONE_BEFORE, BESIDE, ALONE_AFTER, WARM_UP = range(4)  # phases, for the prompts' seeds


@dataclass(frozen=True, slots=True)
class Plan:
    """What is sent."""

    greedy_requests: int = 500
    greedy_output_tokens: int = 16
    greedy_prompt_tokens: int = 96
    small_requests: int = 6  # beside; half of them before and half after
    small_output_tokens: int = 2
    small_prompt_tokens: int = 192  # six steps alone
    small_pauses: bool = True  # after each request as long as it took
    seed: int = 0


@dataclass(slots=True)
class Flood:
    """The greedy tenant: everything at once on one stream, and a count of what has ended."""

    plan: Plan
    num_ended: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, connection: AsyncConnection, vocab_size: int) -> None:
        """Send all, then read until cancelled. A refused or failed request is an error."""
        plan = self.plan
        for index in range(plan.greedy_requests):
            await connection.submit(
                random_ids(plan.greedy_prompt_tokens, vocab_size, [plan.seed, 99, index]),
                max_tokens=plan.greedy_output_tokens,
                ignore_eos=True,
                temperature=0.0,
                tenant=GREEDY,
            )
        async for result in connection:
            if result.HasField("failure"):
                raise MillraceError(f"a greedy request failed: {result.failure.message}")
            self.num_ended += result.response.HasField("summary")
            if self.num_ended >= min(SETTLED, plan.greedy_requests // 2):
                self.settled.set()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds to first token of the small tenant, request by request."""

    alone_s: list[float]
    beside_s: list[float]
    greedy_ended: tuple[int, int]  # when the small tenant began and when it had finished

    @property
    def ratio(self) -> float:
        """Median beside over median alone."""
        return statistics.median(self.beside_s) / statistics.median(self.alone_s)


async def measure(target: str, plan: Plan) -> Outcome:
    """The three phases against one server. Raises MillraceError if a request fails."""
    async with AsyncClient(target) as client:
        model = await client.inference.GetModel(pb.GetModelRequest(), timeout=60)
        small = SmallTenant(client, plan, model.vocab_size)
        await small.send(2, WARM_UP)
        _say("alone")
        alone_s = await small.send(plan.small_requests // 2, ALONE_BEFORE)
        _say("the greedy tenant comes")
        flood = Flood(plan)
        flooding = asyncio.create_task(flood.run(client.connect(), model.vocab_size))
        settled = asyncio.create_task(flood.settled.wait())
        await asyncio.wait((flooding, settled), return_when=asyncio.FIRST_COMPLETED)
        before = flood.num_ended
        _say("beside it")
        beside_s = await small.send(plan.small_requests, BESIDE)
        after = flood.num_ended
        if flooding.done():
            flooding.result()  # raises what went wrong
            raise MillraceError("the greedy tenant was done before the small one")
        flooding.cancel()
        with suppress(asyncio.CancelledError):
            await flooding
        await _until_idle(client)
        _say("alone again")
        alone_s += await small.send(plan.small_requests - plan.small_requests // 2, ALONE_AFTER)
    return Outcome(alone_s, beside_s, (before, after))


@dataclass(frozen=True, slots=True)
class SmallTenant:
    """One request at a time. With a pause as long after each it asks for less than its share."""

    client: AsyncClient
    plan: Plan
    vocab_size: int

    async def send(self, count: int, phase: int) -> list[float]:
        """Prompts that nobody has sent before; returns the seconds to each first token."""
        plan = self.plan
        requests = random_requests(
            count,
            plan.small_prompt_tokens,
            plan.small_output_tokens,
            self.vocab_size,
            [plan.seed, phase],
        )
        sender = GenerateSender(self.client.inference)
        times = []
        for request in requests:
            request.tenant = SMALL
            run = await closed_loop(sender, [request], concurrency=1)
            times += _first_tokens_s(run)
            if plan.small_pauses:
                await asyncio.sleep(run.duration_s)
        return times


def _say(phase: str) -> None:
    print(f"fairness: {phase} ...", file=sys.stderr, flush=True)


def _first_tokens_s(run: Run) -> list[float]:
    failed = [record for record in run.records if not record.ok]
    if failed:
        raise MillraceError(f"a small request failed: {failed[0].status} {failed[0].message}")
    times = [record.ttft_s for record in run.records]
    return [seconds for seconds in times if seconds is not None]


async def _until_idle(client: AsyncClient) -> None:
    """The cancelled have left the batch."""
    while True:
        load = await client.admin.GetLoad(admin_pb2.GetLoadRequest())
        if load.running + load.waiting == 0:
            return
        await asyncio.sleep(0.05)


def report(outcome: Outcome, preemptions: float) -> dict[str, Any]:
    """All that was measured, and the ratio next to its goal."""
    return {
        "ttft_ratio": round(outcome.ratio, 3),
        "goal": GOAL,
        "met": outcome.ratio <= GOAL,
        "alone_s": _spread(outcome.alone_s),
        "beside_s": _spread(outcome.beside_s),
        "greedy_requests_ended": list(outcome.greedy_ended),
        "preemptions": int(preemptions),
        "alone_each_s": [round(seconds, 4) for seconds in outcome.alone_s],
        "beside_each_s": [round(seconds, 4) for seconds in outcome.beside_s],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    found = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> int:
    """Returns the exit code: 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write what was found here")
    tokens = Plan().small_prompt_tokens
    parser.add_argument(
        "--small-prompt-tokens", type=int, default=tokens, help="default: %(default)s"
    )
    parser.add_argument("--no-pauses", action="store_true", help="of the small tenant")
    args = parser.parse_args()
    plan = Plan(small_prompt_tokens=args.small_prompt_tokens, small_pauses=not args.no_pauses)
    found_at = environment(plan.seed)
    try:
        with ServerProcess(SERVER) as server:
            outcome = asyncio.run(measure(server.target, plan))
            found = report(outcome, metric(server.metrics(), "millrace_preemptions_total"))
    except MillraceError as error:
        print(f"fairness: {error}", file=sys.stderr)
        return 1
    for phase in ("alone", "beside"):
        times = found[f"{phase}_s"]
        print(f"{phase:>6}: {times['median']:.3f} s to the first token, median; {times}")
    print(f" ratio: {found['ttft_ratio']:.2f}, goal: at most {GOAL:g}")
    result = {"environment": found_at, "server": list(SERVER), "plan": asdict(plan), **found}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
