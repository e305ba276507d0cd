"""Ledger: what was promised to each request, what it got, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from millrace.perf.sim.script import expected
from millrace.scheduler.admission import Accepted, Decision
from millrace.scheduler.plan import Drawn
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class Ledger:
    """Every request ends once, with exactly the tokens of a run in which it was alone."""

    submitted: list[Request] = field(default_factory=list)  # and accepted
    refused: int = 0
    got: dict[int, list[int]] = field(default_factory=dict)  # by request, in order
    ended: dict[int, Finish] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    abandoned: set[int] = field(default_factory=set)
    sheds_ahead_s: float = 0.0  # how long before its deadline a waiting request is hopeless

    def decided(self, request: Request, decision: Decision) -> None:
        if isinstance(decision, Accepted):
            self.submitted.append(request)
            self.got[request.id] = []
        else:
            assert decision.reason and decision.field and decision.limit, "refused without a reason"
            assert request.slot < 0, "a refused request was given something"
            self.refused += 1

    def drawn(self, drawn: Drawn) -> None:
        for request_id, token in zip(
            drawn.request_ids.tolist(), drawn.token_ids.tolist(), strict=True
        ):
            assert request_id not in self.ended, f"request {request_id}: a token after its end"
            self.got[request_id].append(token)

    def close(self, request: Request, now_s: float) -> None:
        """The request has ended: was it time, and was it given what it should have?"""
        where, finish, got = f"request {request.id}", request.finish, self.got[request.id]
        assert finish is not None, f"{where}: ended without a reason"
        assert request.id not in self.ended, f"{where}: ended twice"
        self.ended[request.id] = finish
        assert got == request.outputs, f"{where}: got {got}, its outputs are {request.outputs}"
        tokens, natural = expected(request)
        if finish is natural and got == tokens:
            stop_token = got[-1] if natural is Finish.STOP else None
            assert request.stop_token == stop_token, f"{where}: stop_token {request.stop_token}"
        else:
            assert self._was_cut_short(request, now_s), f"{where}: {finish}, not {natural}"
            assert got == tokens[: len(got)], f"{where}: got {got}, alone it gets {tokens}"
        assert bool(request.error) == (finish is Finish.ERROR), f"{where}: error text"

    def _was_cut_short(self, request: Request, now_s: float) -> bool:
        if request.finish is Finish.CANCELLED:
            return request.id in self.cancelled
        if request.finish is Finish.DEADLINE:
            due_s = request.deadline_s
            is_shed = request.is_queued  # a preempted one, too: it would draw nothing more
            ahead_s = self.sheds_ahead_s if is_shed else 0.0
            return due_s is not None and due_s - ahead_s <= now_s
        return request.finish is Finish.ERROR and request.id in self.abandoned

    def check_hit_counters(self, scheduler: Scheduler) -> None:
        """Prefix hits are counted once a request, at its first admission."""
        admitted = [r for r in self.submitted if r.scheduled_s > 0]
        hits = sum(request.cached_tokens for request in admitted)
        queries = sum(len(request.prompt) for request in admitted if request.read_cache)
        counters = scheduler.counters
        assert counters.prefix_hit_tokens == hits, f"{counters}, but {hits} hit"
        assert counters.prefix_query_tokens == queries, f"{counters}, but {queries} asked for"
        preemptions = sum(request.num_preemptions for request in self.submitted)
        assert counters.preemptions == preemptions, f"{counters}, but {preemptions} preemptions"
