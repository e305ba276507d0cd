"""World: one scheduler, one fake device, requests that come and go, and a seed for all of it.

Between any two calls anything may happen: an arrival, a cancel of any request in any state, a
deadline, the loss of the device. After every call the state is checked, and every plan is judged.
The order of events comes from one `Random` alone, so a seed replays a world exactly.
"""

from __future__ import annotations

from collections import deque
from random import Random

import numpy as np

from millrace.perf.sim.judge import judge, look
from millrace.perf.sim.ledger import Ledger
from millrace.perf.sim.runner import FakeRunner
from millrace.perf.sim.scenario import (
    A_STEP_S,
    A_TOKEN_S,
    TURNS_TO_FIRST_TOKEN,
    draw_request,
    draw_scenario,
    policy_of,
)
from millrace.perf.sim.script import expected
from millrace.perf.sim.shares import Shares
from millrace.scheduler.cost_model import CostModel, StepLoad
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import Drawn, StepPlan, StepResult
from millrace.scheduler.request import NO_SLOT, Finish
from millrace.scheduler.scheduler import Scheduler

MAX_REQUESTS = 24
TURN_S = 1.0
NOBODY = np.empty(0, np.int64)
TURNS_A_TOKEN = 12  # far more than any request needs: beyond it, nothing moves


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
        self.ledger = Ledger(sheds_ahead_s=TURNS_TO_FIRST_TOKEN if sheds else 0.0)
        self.in_flight: deque[StepResult] = deque()
        self.num_arrived = 0
        self.now_s = TURN_S
        self.log: list[str] = []

    def run(self) -> None:
        """Until every request has come and gone; AssertionError at the first thing amiss."""
        longest = self.scenario.max_prompt + self.scenario.max_tokens
        turns = 100 + TURNS_A_TOKEN * self.scenario.num_requests * longest
        while self.num_arrived < self.scenario.num_requests or not self.scheduler.is_idle:
            assert turns > 0, "no progress"
            turns -= 1
            self._turn()
        self._check_end()

    def _turn(self) -> None:
        self.now_s += TURN_S
        self._disturb()
        has_launched = len(self.in_flight) < self.scenario.steps_in_flight and self._launch()
        self._disturb()
        if self.in_flight and not (has_launched and self.rng.random() < self.scenario.lag):
            self._land()
        check(self.scheduler)

    # ------------------------------------------------------------ the loop of an engine

    def _launch(self) -> bool:
        before, shares = look(self.scheduler, self.runner), Shares.look(self.scheduler)
        plan = self.scheduler.schedule(self.now_s)
        check(self.scheduler)
        if plan is not None:
            result = self.runner.execute(plan)
            self._measure(plan)
            self.in_flight.append(result)
            self._say(
                f"step {plan.step} launched: {plan.num_decodes} decodes,"
                f" prefill {[(chunk.slot, chunk.start, chunk.length) for chunk in plan.prefill]},"
                f" admitted {[request.id for request in plan.admitted]},"
                f" copied {plan.block_copies}, out {plan.swap_outs}, in {plan.swap_ins},"
                f" released slots {plan.released}, blocks {plan.block_appends.tolist()}"
            )
        elif not self.in_flight:
            assert not self.scheduler.requests, "requests live, but nothing runs or is planned"
        judge(self.scheduler, self.runner, before, plan)
        shares.judge_plan(self.scheduler, plan)
        return plan is not None

    def _measure(self, plan: StepPlan) -> None:
        prefill = plan.num_tokens - plan.num_decodes
        load = StepLoad(prefill, plan.num_decodes, plan.context_tokens)
        assert self.scheduler.cost is not None, "a world has one"
        self.scheduler.cost.measured(load, A_STEP_S + prefill * A_TOKEN_S)

    def _land(self) -> None:
        result = self.in_flight.popleft()
        self.runner.land(result.step)
        shares, live = Shares.look(self.scheduler), dict(self.scheduler.requests)
        drawn = self.scheduler.apply(result, self.now_s)
        shares.judge_drawn(self.scheduler, live, drawn)
        tokens = dict(zip(drawn.request_ids.tolist(), drawn.token_ids.tolist(), strict=True))
        self._say(f"step {result.step} applied: tokens {tokens}")
        self.ledger.drawn(drawn)
        self._settle()

    def _settle(self) -> None:
        for request in self.scheduler.take_ended():
            self._say(f"request {request.id} ended: {request.finish}")
            self.ledger.close(request, self.now_s)

    # ------------------------------------------------------------ what happens to it

    def _disturb(self) -> None:
        scenario = self.scenario
        while self.num_arrived < scenario.num_requests and self._happens(scenario.arrival):
            self._arrive()
        if self.num_arrived and self._happens(scenario.cancel):
            self._cancel(self.rng.randrange(self.num_arrived))
        if self._happens(scenario.abandon):
            self._abandon()
        self.scheduler.expire(self.now_s)
        self._settle()

    def _happens(self, chance: float) -> bool:
        return chance > 0 and self.rng.random() < chance

    def _arrive(self) -> None:
        request = draw_request(self.rng, self.scenario, self.num_arrived, self.now_s)
        self.num_arrived += 1
        shares = Shares.look(self.scheduler)
        decision = self.scheduler.submit(request)
        self._say(f"request {request.id} arrives: {len(request.prompt)} tokens, {decision}")
        self.ledger.decided(request, decision)
        shares.judge_drawn(self.scheduler, {}, Drawn(NOBODY, NOBODY))  # nothing to pay for

    def _cancel(self, request_id: int) -> None:
        """Any request: it may wait, run, be in flight, have ended, or never have been accepted."""
        is_live = request_id in self.ledger.got and request_id not in self.ledger.ended
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
        self.scheduler.abandon("the device was lost", self.now_s)
        assert self.scheduler.num_running == 0, "a slot outlived the device"

    def _say(self, event: str) -> None:
        self.log.append(f"{self.now_s:6g} s  {event}")

    # ------------------------------------------------------------ and how it must end

    def _check_end(self) -> None:
        scheduler, ledger = self.scheduler, self.ledger
        unfinished = {request.id for request in ledger.submitted} - ledger.ended.keys()
        assert not unfinished, f"requests {unfinished} never ended"
        assert len(ledger.submitted) + ledger.refused == self.scenario.num_requests
        assert not self.in_flight, "idle, with a step in flight"
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.waiting_tokens) == (0, 0, 0)
        assert scheduler.pool.num_available == self.scenario.limits.num_blocks, "blocks leaked"
        ledger.check_hit_counters(scheduler)
        for request in ledger.submitted:
            tokens = request.prompt.tolist() + expected(request)[0]
            known = np.asarray(tokens, np.int32)
            blocks = scheduler.cache.match(known, request.tenant).tolist()
            assert self.runner.holds(tokens, blocks), f"wrong KV is cached for {tokens}"
            partial = scheduler.cache.partial(known, np.asarray(blocks), request.tenant)
            if partial is not None:
                tail, end = partial[0], len(blocks) * self.runner.block_size + partial[1]
                is_right = self.runner.holds(tokens[:end], [*blocks, tail])
                assert is_right, f"wrong KV is in the tail {tail} of {tokens}"
        assert scheduler.pool.flush() <= self.scenario.limits.num_blocks
        assert len(scheduler.cache) == 0, "an idle cached block could not be evicted"


def simulate(seed: int) -> World:
    """Run the world of a seed to its end; a failure says how to see it again."""
    world = World(Random(seed))
    try:
        world.run()
    except Exception as error:
        error.add_note(f"replay with python -m millrace.perf.sim --seed {seed}")
        raise
    return world
