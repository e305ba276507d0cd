"""Shares: an account beside the fair share's own, kept from what the device was seen to do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from millrace.perf.sim.scenario import Scenario
from millrace.scheduler.fair_share import OUTPUT_PRICE, PROMPT_PRICE, FairShare
from millrace.scheduler.plan import Drawn, StepPlan
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Scheduler

ROUNDING = 1e-6


@dataclass(slots=True)
class Shares:
    """The counters as of the last look. Blind to other policies than the fair share."""

    counters: dict[str, float]
    waiting: list[Request]

    @classmethod
    def look(cls, scheduler: Scheduler) -> Shares:
        policy = scheduler.policy
        if not isinstance(policy, FairShare):
            return cls({}, [])
        tenants = {request.tenant for request in scheduler.requests.values()}
        return cls({tenant: policy.counter(tenant) for tenant in tenants}, list(policy))

    def judge_plan(self, scheduler: Scheduler, plan: StepPlan | None) -> None:
        """The first to be admitted is of the least served tenant; prompts are paid for once."""
        admitted = plan.admitted if plan is not None else []
        charges: dict[str, float] = defaultdict(float)
        for request in admitted:
            if request.num_preemptions == 0:
                fresh = len(request.prompt) - request.cached_tokens
                charges[request.tenant] += PROMPT_PRICE * fresh / request.weight
        if admitted and admitted[0] in self.waiting:
            least = min(self.counters.get(request.tenant, 0.0) for request in self.waiting)
            counter = self.counters.get(admitted[0].tenant, 0.0)
            assert counter <= least + ROUNDING, f"{admitted[0].tenant!r} is not the least served"
        self._judge_charges(scheduler, charges)

    def judge_drawn(self, scheduler: Scheduler, requests: dict[int, Request], drawn: Drawn) -> None:
        """Every token drawn is paid for, by its request's tenant."""
        charges: dict[str, float] = defaultdict(float)
        for request_id in drawn.request_ids.tolist():
            request = requests[request_id]
            charges[request.tenant] += OUTPUT_PRICE / request.weight
        self._judge_charges(scheduler, charges)

    def judge_spread(self, scheduler: Scheduler, scenario: Scenario) -> None:
        """Tenants that wait differ by what one of them can be given between two turns of its own.

        Once a tenant is chosen, it had the least; since then it was charged that prompt, and what
        its running requests drew. All weights are at least 1.
        """
        policy = scheduler.policy
        if not isinstance(policy, FairShare):
            return
        counters = [policy.counter(tenant) for tenant in {r.tenant for r in policy}]
        drawn = scenario.limits.max_running * scenario.max_tokens
        bound = PROMPT_PRICE * scenario.max_prompt + OUTPUT_PRICE * drawn + ROUNDING
        if counters:
            spread = max(counters) - min(counters)
            assert spread <= bound, f"tenants that wait differ by {spread}, more than {bound}"

    def _judge_charges(self, scheduler: Scheduler, charges: dict[str, float]) -> None:
        policy = scheduler.policy
        if not isinstance(policy, FairShare):
            return
        still_waits = {request.tenant for request in self.waiting if request.is_queued}
        for tenant, before in self.counters.items():
            gained, due = policy.counter(tenant) - before, charges.get(tenant, 0.0)
            assert gained >= due - ROUNDING, f"{tenant!r} was charged {gained}, not {due}"
            if tenant in still_waits:  # so it has not begun to wait meanwhile, and was not lifted
                assert gained <= due + ROUNDING, f"{tenant!r} was charged {gained}, not {due}"
