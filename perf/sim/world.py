"""World: one scheduler, one fake device, requests that come and go, and a seed for all of it.

Between any two calls anything may happen: an arrival, a cancel of any request in any state, a
client that is gone with all its streams, a deadline, a clock that jumps, the loss of the device.
After every call the state is checked, and every plan is judged. Time is virtual: it passes as the
device's steps take it. The order of events comes from one `Random` alone, so a seed replays a world
exactly.

In a world of many requests the state is recounted from scratch only at every RECOUNT_EVERY-th call,
as that costs more than all else; the plans, the device's blocks and the tokens are still judged at
every step.
"""

from __future__ import annotations

from collections import Counter, deque
from random import Random

import numpy as np

from millrace.perf.sim.clock import Clock
from millrace.perf.sim.crowd import Crowd
from millrace.perf.sim.device import Device
from millrace.perf.sim.judge import judge, look
from millrace.perf.sim.ledger import Ledger
from millrace.perf.sim.load import LoadCounter
from millrace.perf.sim.patience import TURNS_A_TOKEN, TURNS_TO_SETTLE, Patience
from millrace.perf.sim.runner import FakeRunner
from millrace.perf.sim.scenario import (
    A_STEP_S,
    A_TOKEN_S,
    FIRST_TOKEN_S,
    MANY,
    draw_scenario,
    policy_of,
    step_cost_s,
)
from millrace.perf.sim.script import expected
from millrace.perf.sim.shares import Shares
from millrace.scheduler.admission import Accepted
from millrace.scheduler.cost_model import CostModel, StepLoad
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import Drawn, StepPlan, StepResult
from millrace.scheduler.request import NO_SLOT, Finish, Request
from millrace.scheduler.scheduler import Scheduler

MAX_REQUESTS = 24
RECOUNT_EVERY = 64  # calls, in a world of many requests
STREAMS_OF_A_CLIENT = 4
REMEMBERED = 20  # requests whose cached blocks are read at every RECOUNT_EVERY-th turn
NOBODY = np.empty(0, np.int64)


class World:
    """Draws its scenario from `rng`, and then all that happens."""

    def __init__(self, rng: Random, max_requests: int = MAX_REQUESTS) -> None:
        self.rng = rng
        self.scenario = draw_scenario(rng, max_requests)
        self.scheduler = Scheduler(
            self.scenario.limits, policy_of(self.scenario.policy, self.scenario.limits), CostModel()
        )
        self.scheduler.cache.longest_edge = rng.choice([1, 2, 3, 64])  # small worlds see its end
        self.runner = FakeRunner(self.scenario.limits)
        sheds = self.scenario.policy == "deadline"
        self.ledger = Ledger(sheds_ahead_s=FIRST_TOKEN_S if sheds else 0.0)
        self.in_flight: deque[StepResult] = deque()
        self.clock = Clock(rng, self.scenario.clock_jump)
        self.crowd = Crowd(rng, self.scenario)
        own = Random(rng.getrandbits(32))
        self.device = Device(step_cost_s, own, self.scenario.roughness)
        self.loads = LoadCounter(self.scenario.limits.max_running)
        longest = self.scenario.max_prompt + self.scenario.max_tokens
        self.patience = Patience(longest, self.scenario.policy != "first_come")
        self.recount_every = RECOUNT_EVERY if max_requests >= MANY else 1
        self.num_calls = 0
        self.num_steps = 0
        self.log: list[str] = []

    @property
    def now_s(self) -> float:
        """What the scheduler is told."""
        return self.clock.told_s

    def run(self) -> None:
        """Until every request has come and gone; AssertionError at the first thing amiss."""
        turns = TURNS_A_TOKEN * self.scenario.num_requests * self.patience.longest
        while self.crowd.num_arrived < self.scenario.num_requests or not self.scheduler.is_idle:
            assert self.patience.turn <= TURNS_TO_SETTLE + turns, "no progress"
            self._turn()
        self._check_end()

    def _turn(self) -> None:
        self.patience.next_turn()
        if self.scheduler.is_idle:
            self.clock.wait_until(self.crowd.next_s)
        self.clock.tick()
        self._disturb()
        has_launched = len(self.in_flight) < self.scenario.steps_in_flight and self._launch()
        self._disturb()
        if self.in_flight and not (has_launched and self.rng.random() < self.scenario.lag):
            self._land()
        self._recount()
        if self.patience.turn % RECOUNT_EVERY == 0:
            self._check_cached(self.ledger.submitted[-REMEMBERED:])

    def tally(self) -> Counter[str]:
        """What happened, for who wants to know whether anything did."""
        counters, ledger = self.scheduler.counters, self.ledger
        happened = Counter[str](finish.value for finish in ledger.ended.values())
        happened["requests"] = self.crowd.num_arrived
        happened["next turns"] = self.crowd.num_next_turns
        happened["refused"] = ledger.refused
        happened["steps"] = self.num_steps
        happened["tokens"] = sum(map(len, ledger.got.values()))
        happened["preempted"] = counters.preemptions
        happened["shed"] = counters.shed
        happened["hit tokens"] = counters.prefix_hit_tokens
        happened["abandoned"] = len(ledger.abandoned)
        happened["clock jumps"] = self.clock.num_jumps
        return happened

    # ------------------------------------------------------------ the loop of an engine

    def _launch(self) -> bool:
        before, shares = look(self.scheduler, self.runner), Shares.look(self.scheduler)
        plan = self.scheduler.schedule(self.now_s)
        self._recount()
        if plan is not None:
            result = self.runner.execute(plan)
            self.num_steps += 1
            self.device.launch(self.loads.count(plan), self.clock.true_s)
            self._measure(plan)
            self.in_flight.append(result)
            self._say(
                f"step {plan.step} launched: {plan.num_decodes} decodes,"
                f" drafts {plan.drafts.tolist()},"
                f" prefill {[(chunk.slot, chunk.start, chunk.length) for chunk in plan.prefill]},"
                f" admitted {[request.id for request in plan.admitted]},"
                f" copied {plan.block_copies}, out {plan.swap_outs}, in {plan.swap_ins},"
                f" released slots {plan.released}, blocks {plan.block_appends.tolist()}"
            )
        elif not self.in_flight:
            assert not self.scheduler.requests, "requests live, but nothing runs or is planned"
        judge(self.scheduler, self.runner, before, plan)
        shares.judge_plan(self.scheduler, plan)
        shares.judge_spread(self.scheduler, self.scenario)
        return plan is not None

    def _measure(self, plan: StepPlan) -> None:
        prefill = plan.num_tokens - plan.num_decodes
        load = StepLoad(prefill, plan.num_decodes, plan.context_tokens)
        assert self.scheduler.cost is not None, "a world has one"
        self.scheduler.cost.measured(load, A_STEP_S + prefill * A_TOKEN_S)

    def _land(self) -> None:
        result = self.in_flight.popleft()
        self.clock.wait_until(self.device.land())
        self.runner.land(result.step)
        shares, live = Shares.look(self.scheduler), dict(self.scheduler.requests)
        drawn = self.scheduler.apply(result, self.now_s)
        shares.judge_drawn(self.scheduler, live, drawn)
        tokens = list(zip(drawn.request_ids.tolist(), drawn.token_ids.tolist(), strict=True))
        self._say(f"step {result.step} applied: tokens {tokens}")
        self.ledger.drawn(drawn)
        self._settle()

    def _settle(self) -> None:
        for request in self.scheduler.take_ended():
            self._say(f"request {request.id} ended: {request.finish}")
            self.ledger.close(request, self.now_s)
            self.patience.ended(request)
            self.crowd.ended(request, self.clock.true_s)

    # ------------------------------------------------------------ what happens to it

    def _disturb(self) -> None:
        scenario, crowd = self.scenario, self.crowd
        while (request := crowd.come(self.clock.true_s, self.now_s)) is not None:
            self._arrive(request)
        if crowd.num_arrived and self._happens(scenario.cancel):
            self._cancel(self._anyone())
        if crowd.num_arrived and self._happens(scenario.disconnect):
            first = self._anyone()
            for request_id in range(first, min(first + STREAMS_OF_A_CLIENT, crowd.num_arrived)):
                self._cancel(request_id)
        if self._happens(scenario.abandon):
            self._abandon()
        self.scheduler.expire(self.now_s)
        self._settle()

    def _happens(self, chance: float) -> bool:
        return chance > 0 and self.rng.random() < chance

    def _anyone(self) -> int:
        """Of those that came; of many, one that came of late and so may still be here."""
        num_arrived = self.crowd.num_arrived
        return self.rng.randrange(max(0, num_arrived - MANY), num_arrived)

    def _arrive(self, request: Request) -> None:
        shares = Shares.look(self.scheduler)
        decision = self.scheduler.submit(request)
        self._say(f"request {request.id} arrives: {len(request.prompt)} tokens, {decision}")
        self.ledger.decided(request, decision)
        if isinstance(decision, Accepted):
            self.patience.accepted(request, len(self.scheduler.requests))
        shares.judge_drawn(self.scheduler, {}, Drawn(NOBODY, NOBODY))  # nothing to pay for

    def _cancel(self, request_id: int) -> None:
        """Any request: it may wait, run, be in flight, have ended, or never have been accepted."""
        ledger = self.ledger
        is_over = request_id in ledger.ended or request_id in ledger.cancelled
        is_live = request_id in ledger.got and not is_over
        if is_live:
            self._say(f"request {request_id} is cancelled")
            self.ledger.cancelled.add(request_id)
        did_end = self.scheduler.finish(request_id, Finish.CANCELLED, self.now_s)
        assert did_end == is_live, f"request {request_id}: finish says {did_end}"

    def _abandon(self) -> None:
        self._say("the device is lost")
        live = self.scheduler.requests.values()
        self.ledger.abandoned |= {request.id for request in live if request.slot != NO_SLOT}
        self.in_flight.clear()
        self.runner.lose()
        self.device.lose()
        self.loads.forget_decodes()
        self.scheduler.abandon("the device was lost", self.now_s)
        assert self.scheduler.num_running == 0, "a slot outlived the device"

    def _say(self, event: str) -> None:
        self.log.append(f"{self.now_s:6g} s  {event}")

    # ------------------------------------------------------------ what must hold

    def _recount(self) -> None:
        """From scratch: every slot, block and request."""
        self.num_calls += 1
        if self.num_calls % self.recount_every == 0:
            check(self.scheduler)

    def _check_end(self) -> None:
        scheduler, ledger = self.scheduler, self.ledger
        unfinished = {request.id for request in ledger.submitted} - ledger.ended.keys()
        assert not unfinished, f"requests {unfinished} never ended"
        assert len(ledger.submitted) + ledger.refused == self.scenario.num_requests
        assert not self.in_flight, "idle, with a step in flight"
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.waiting_tokens) == (0, 0, 0)
        assert scheduler.pool.num_available == self.scenario.limits.num_blocks, "blocks leaked"
        ledger.check_hit_counters(scheduler)
        self._check_cached(ledger.submitted)
        assert scheduler.pool.flush() <= self.scenario.limits.num_blocks
        assert len(scheduler.cache) == 0, "an idle cached block could not be evicted"

    def _check_cached(self, requests: list[Request]) -> None:
        """Whatever is found for a request's tokens is what computing them again would write."""
        for request in requests:
            tokens = request.prompt.tolist() + expected(request)[0]
            known = np.asarray(tokens, np.int32)
            blocks = self.scheduler.cache.match(known, request.tenant).tolist()
            assert self.runner.holds(tokens, blocks), f"wrong KV is cached for {tokens}"
            partial = self.scheduler.cache.partial(known, np.asarray(blocks), request.tenant)
            if partial is not None:
                tail, end = partial[0], len(blocks) * self.runner.block_size + partial[1]
                is_right = self.runner.holds(tokens[:end], [*blocks, tail])
                assert is_right, f"wrong KV is in the tail {tail} of {tokens}"


def simulate(seed: int, max_requests: int = MAX_REQUESTS) -> World:
    """Run the world of a seed to its end; a failure says how to see it again."""
    world = World(Random(seed), max_requests)
    try:
        world.run()
    except Exception as error:
        many = f" --requests {max_requests}" if max_requests != MAX_REQUESTS else ""
        error.add_note(f"replay with python -m millrace.perf.sim --seed {seed}{many}")
        raise
    return world
