"""Tenants: who sends which request, and what each of them got.

Written as "chat:3,batch:1" for three requests of one to each of the other; "batch:1:5" gives a
tenant's requests a class of priority, too. What it comes to depends on the server's policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from millrace.perf.loadgen.drive import Run
from millrace.perf.loadgen.report import Summary, summarize
from millrace.v1 import inference_pb2 as pb

FORM = "NAME:SHARE[:PRIORITY], ..., shares and priorities as whole numbers"


@dataclass(frozen=True, slots=True)
class Tenant:
    """One that sends; `name` is as the server knows it, "" nobody's."""

    name: str
    share: int  # of the requests, beside the shares of the others
    priority: int | None  # None: the request does not say


def parse_tenants(text: str | None, priority: int | None = None) -> tuple[Tenant, ...]:
    """Of `text` as above; None: nobody by name. `priority` is of those that give none.

    Raises ValueError naming the part that is not of the form.
    """
    if text is None:
        return () if priority is None else (Tenant("", 1, priority),)
    found = [_parse(part.strip(), priority) for part in text.split(",")]
    names = [tenant.name for tenant in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{text!r}: each tenant once")
    return tuple(found)


def _parse(part: str, priority: int | None) -> Tenant:
    name, *numbers = part.split(":")
    if not name or not 1 <= len(numbers) <= 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"{part!r} is not of the form {FORM}")
    share, *own = map(int, numbers)
    if share < 1:
        raise ValueError(f"{part!r}: a share is at least 1")
    return Tenant(name, share, own[0] if own else priority)


def assign(requests: Iterable[pb.GenerateRequest], tenants: Sequence[Tenant]) -> None:
    """Give each request its tenant: by shares, as evenly as they can be mixed."""
    if not tenants:
        return
    total, sent = sum(tenant.share for tenant in tenants), dict.fromkeys(tenants, 0)
    for index, request in enumerate(requests, 1):
        owed = {tenant: index * tenant.share - total * sent[tenant] for tenant in tenants}
        chosen = max(tenants, key=owed.__getitem__)
        sent[chosen] += 1
        request.tenant = chosen.name
        if chosen.priority is not None:
            request.priority = chosen.priority


def by_tenant(run: Run) -> dict[str, Summary]:
    """The figures of each tenant that has a name; a duration is up to its own last end."""
    names = dict.fromkeys(record.tenant for record in run.records if record.tenant)
    return {
        name: summarize(Run(run.start_s, [r for r in run.records if r.tenant == name]))
        for name in names
    }


def tenant_lines(summaries: Mapping[str, Summary]) -> list[str]:
    """A line a tenant."""
    return [
        f"tenant {name}: {summary.successful} requests,"
        f" {summary.output_tokens_per_s:.1f} tokens/s, TTFT median {summary.ttft.median:.0f} ms,"
        f" p99 {summary.ttft.p99:.0f} ms, TPOT median {summary.tpot.median:.1f} ms"
        + (f", {sum(summary.failures.values())} failed" if summary.failures else "")
        for name, summary in summaries.items()
    ]
