"""FairShare: each tenant gets its share of the tokens, whatever the others send.

A virtual token counter for each tenant (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024) says what it has been given, in tokens of prompt, divided by its weight:

    counter += PROMPT_PRICE * (prompt tokens - cached ones) / weight     when a request starts
    counter += OUTPUT_PRICE / weight                                     for each token drawn

The tenant with the least counter is next, within a tenant the first to come. Nothing is predicted,
no slot is kept free. Tokens computed again after a preemption are not charged: the scheduler chose
that.

A share is of little use to a tenant whose requests wait until those of another end. So a tenant
that is next, and runs less than half of what another runs, waits for nobody: where slots or blocks
lack, the youngest request of the tenant that runs most yields, and prompts that have begun go on
after the newcomer's. Beyond the half there is no haste: slots come back by themselves.

Being idle earns nothing: a tenant that begins to wait is lifted to the least counter of those that
wait, or, if nobody does, of the last that did. So while two tenants both have requests waiting,
what they are given, by weight, differs by a constant:

    2 * max(PROMPT_PRICE * longest prompt, OUTPUT_PRICE * tokens that the cache holds) / weight
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from millrace.scheduler.policy import MAX_YIELDS
from millrace.scheduler.request import Request
from millrace.scheduler.request_heap import RequestHeap
from millrace.scheduler.slots import Slots

PROMPT_PRICE = 1.0
OUTPUT_PRICE = 2.0  # an output token keeps a slot for a step; prompt tokens share one


HASTE = 2.0  # times what a tenant runs, by weight: it does not wait for one that runs more
SWEEP_AT = 64  # tenants known, before the first look for some to forget


@dataclass(eq=False, slots=True)
class _Tenant:
    serial: int  # order of coming; breaks ties
    counter: float
    weight: float
    queue: RequestHeap = field(default_factory=RequestHeap)
    num_waiting: int = 0
    num_running: int = 0
    number: int = 0  # while it runs
    has_entry: bool = False  # in the order of those that wait

    @property
    def load(self) -> float:
        """What it runs, by weight."""
        return self.num_running / self.weight


class FairShare:
    """Weighted fair share across `Request.tenant`. The most served tenant's youngest yields."""

    def __init__(self, num_slots: int) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._num_seen = 0
        self._sweep_at = SWEEP_AT
        self._order: list[tuple[float, int, _Tenant]] = []  # heap: counter, serial
        self._virtual_time = 0.0  # where a tenant starts if nobody else waits
        self._running: list[_Tenant | None] = [None] * num_slots  # by number
        self._free_numbers = list(range(num_slots - 1, -1, -1))
        self._number_of_slot = np.zeros(num_slots, np.intp)
        self._price = np.zeros(num_slots)  # of one token drawn in this slot
        self._owed = np.zeros(num_slots)  # drawn in it, and not yet on its tenant's counter
        self._is_settled = True  # nothing is owed
        self._spare = np.zeros(num_slots)  # by number: what it would run without one, by weight

    def __iter__(self) -> Iterator[Request]:
        return (request for tenant in self._tenants.values() for request in tenant.queue)

    def push(self, request: Request) -> None:
        self._settle()
        tenant = self._tenant(request)
        if tenant.num_waiting == 0:
            tenant.counter = max(tenant.counter, self._start())
            if not tenant.has_entry:
                tenant.has_entry = True
                heapq.heappush(self._order, (tenant.counter, tenant.serial, tenant))
        tenant.num_waiting += 1
        tenant.queue.push(request.arrival, request)

    def head(self) -> Request | None:
        if not self._order:
            return None
        self._settle()
        tenant = self._first()
        return None if tenant is None else tenant.queue.head()

    def pop(self) -> None:
        tenant = self._first()
        request = None if tenant is None else tenant.queue.head()
        assert tenant is not None and request is not None, "pop() takes what head() gave"
        tenant.queue.pop()
        if tenant.num_running == 0:
            tenant.number = self._free_numbers.pop()
            self._running[tenant.number] = tenant
        tenant.num_running += 1
        self._spare[tenant.number] = (tenant.num_running - 1) / tenant.weight
        self._number_of_slot[request.slot] = tenant.number
        self._price[request.slot] = OUTPUT_PRICE / request.weight
        if request.num_preemptions == 0:
            fresh = len(request.prompt) - request.cached_tokens
            tenant.counter += PROMPT_PRICE * fresh / request.weight
        self._waits_less(tenant)

    def gone(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        tenant.queue.gone()
        self._waits_less(tenant)

    def left(self, request: Request) -> None:
        self._settle()
        tenant = self._tenants[request.tenant]
        tenant.num_running -= 1
        self._spare[tenant.number] = max(0, tenant.num_running - 1) / tenant.weight
        self._price[request.slot] = 0.0
        if tenant.num_running == 0:
            self._running[tenant.number] = None
            self._free_numbers.append(tenant.number)

    def drew(self, slots: Slots) -> None:
        self._owed += np.bincount(slots, self._price[slots], len(self._owed))
        self._is_settled = False

    def hopeless(self, now_s: float) -> Request | None:
        return None

    def victim(self, running: Iterable[Request]) -> Request:
        """Of those that have not yielded too often, the most served tenant's youngest.

        Counters change as tenants are served, so two could take turns in yielding to each other.
        The limit ends that: then the oldest of all goes on.
        """
        self._settle()

        def rank(request: Request) -> tuple[bool, float, int]:
            is_spared = request.num_preemptions >= MAX_YIELDS
            counter = 0.0 if is_spared else self._tenants[request.tenant].counter
            return not is_spared, counter, request.arrival

        return max(running, key=rank)

    def is_pressing(self) -> bool:
        """The next tenant runs less than half of what another runs, by weight."""
        if not self._order:
            return False
        self._settle()
        tenant = self._first()
        return tenant is not None and bool(self._spare.max() > HASTE * tenant.load)

    def makes_room(self, running: Iterable[Request]) -> Request | None:
        """The youngest of the tenant that runs most, by weight; but of none that was given less.

        Nobody yields so more than MAX_YIELDS times: what a tenant can make another lose is bounded,
        however many short requests it sends.
        """
        self._settle()
        head = self._first()
        assert head is not None, "who is pressing waits"

        def is_able(request: Request) -> bool:
            tenant = self._tenants[request.tenant]
            is_served_more = (tenant.counter, tenant.serial) > (head.counter, head.serial)
            runs_more = self._spare[tenant.number] > HASTE * head.load
            return is_served_more and runs_more and request.num_preemptions < MAX_YIELDS

        able = filter(is_able, running)
        return max(able, key=lambda r: (self._tenants[r.tenant].load, r.arrival), default=None)

    def in_order(self, begun: list[Request]) -> list[Request]:
        """Prompts of the tenants that run least go first."""
        if len(begun) < 2:
            return begun
        return sorted(begun, key=lambda request: self._tenants[request.tenant].load)

    def counter(self, tenant: str) -> float:
        """What a tenant has been given, or would start with."""
        self._settle()
        return self._tenants[tenant].counter if tenant in self._tenants else self._floor()

    def _settle(self) -> None:
        """Put what was drawn on the counters."""
        if self._is_settled:
            return
        self._is_settled = True
        owed = np.bincount(self._number_of_slot, weights=self._owed)
        for number in owed.nonzero()[0].tolist():
            tenant = self._running[number]
            assert tenant is not None, "who draws runs"
            tenant.counter += float(owed[number])
        self._owed[:] = 0.0

    def _first(self) -> _Tenant | None:
        """The tenant with the least counter of those that wait.

        Counters only rise. So an entry that is out of date stands too early, never too late: it is
        put right when it comes to the top.
        """
        while self._order:
            counter, serial, tenant = self._order[0]
            if tenant.num_waiting == 0:
                heapq.heappop(self._order)
                tenant.has_entry = False
            elif tenant.counter != counter:
                heapq.heapreplace(self._order, (tenant.counter, serial, tenant))
            else:
                return tenant
        return None

    def _floor(self) -> float:
        """The least counter that a tenant may begin to wait with. It never falls."""
        first = self._first()
        return self._virtual_time if first is None else first.counter

    def _start(self) -> float:
        """Where a tenant begins to wait: at the floor, and ahead of one there that runs already.

        Ties go to the tenant that is known longest. So one that runs nothing is never passed over
        by newcomers, however many names they have.
        """
        first = self._first()
        is_served = first is not None and first.num_running > 0
        return math.nextafter(self._floor(), -math.inf) if is_served else self._floor()

    def _waits_less(self, tenant: _Tenant) -> None:
        tenant.num_waiting -= 1
        if tenant.num_waiting == 0:
            self._virtual_time = max(self._virtual_time, tenant.counter)

    def _tenant(self, request: Request) -> _Tenant:
        """Whose request it is; a new tenant costs a look for those that can be forgotten."""
        name = request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._sweep_at:
                self._sweep()
            self._num_seen += 1
            tenant = _Tenant(self._num_seen, self._start(), request.weight)
            self._tenants[name] = tenant
        tenant.weight = request.weight  # the newest request's, where they differ
        return tenant

    def _sweep(self) -> None:
        """Forget tenants that have nothing here and would be lifted past their counter."""
        floor = self._floor()
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.num_waiting or tenant.num_running or tenant.counter > floor
        }
        self._sweep_at = max(SWEEP_AT, 2 * len(self._tenants))
