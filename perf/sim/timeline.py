"""One picture a policy: the same crowd, served by each, drawn from real runs of the scheduler.

    python -m millrace.perf.sim.timeline docs/scheduling.svg

A row is a request: grey while it waits, dark while its prompt is computed, in its tenant's colour
while it decodes; a cross where it was shed. The device's time is virtual, by a fixed cost a step.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from millrace.scheduler.plan import StepPlan, StepResult
from millrace.scheduler.policies import make_policy
from millrace.scheduler.request import Finish, Request
from millrace.scheduler.scheduler import Limits, Scheduler

POLICIES = ("first_come", "priority", "fair_share", "deadline")
CAPTIONS = {
    "first_come": "in order of arrival",
    "priority": "class 0 (orange) before class 1 (blue), which ages",
    "fair_share": "the tenant that has been given least is next",
    "deadline": "orange is due within 4 s and goes first; a cross: shed, could not make it",
}
LIMITS = Limits(200, 16, 4, 256, 100, 100_000)
STEP_S, TOKEN_S, AGING_S = 0.02, 0.0005, 3.0
NUM_BLUE, NUM_ORANGE = 16, 6
BLUE, ORANGE, WAIT, PREFILL, INK = "#3b6ea8", "#d9822b", "#d5dae1", "#1f2933", "#52606d"
WIDTH, LEFT, ROW, HEAD, SECOND = 1000, 20, 7, 34, 135  # pixels


Arrival = tuple[float, str, int, float | None]  # when, tenant, class, patience in seconds


@dataclass(slots=True)
class Row:
    """What became of one request."""

    request: Request
    colour: str
    prefilled_s: float | None = None
    end_s: float = 0.0


@dataclass(slots=True)
class Run:
    """One policy's run."""

    policy: str
    rows: list[Row] = field(default_factory=list)


def crowd() -> list[Request]:
    """Sixteen of one tenant at once; six of another, one at a time behind them."""
    rng = np.random.default_rng(0)
    blue: list[Arrival] = [(0.05 * index, "blue", 1, None) for index in range(NUM_BLUE)]
    orange: list[Arrival] = [(1.0 + 0.5 * index, "orange", 0, 4.0) for index in range(NUM_ORANGE)]
    orange[-1] = (*orange[-1][:3], 0.05)  # too little time even alone
    requests = []
    for index, (arrived_s, tenant, priority, patience_s) in enumerate(sorted(blue + orange)):
        prompt = rng.integers(0, 30_000, 160, dtype=np.int32)
        deadline_s = None if patience_s is None else arrived_s + patience_s
        requests.append(
            Request(
                index,
                prompt,
                max_tokens=40,
                deadline_s=deadline_s,
                arrived_s=arrived_s,
                priority=priority,
                tenant=tenant,
            )
        )
    return requests


def simulate(policy: str) -> Run:
    """Virtual time: a step takes STEP_S, and TOKEN_S for each of its tokens."""
    order = make_policy(policy, LIMITS.max_running, AGING_S, lambda request: 0.1)
    scheduler, run = Scheduler(LIMITS, order), Run(policy)
    coming, rows, decodes, now_s = crowd(), {}, np.zeros(LIMITS.max_running, np.bool_), 0.0
    while coming or scheduler.requests:
        while coming and coming[0].arrived_s <= now_s:
            request = coming.pop(0)
            if policy != "deadline":
                request.deadline_s = None
            colour = BLUE if request.tenant == "blue" else ORANGE
            rows[request.id] = Row(request, colour)
            scheduler.submit(request)
        scheduler.expire(now_s)
        plan = scheduler.schedule(now_s)
        now_s += STEP_S + (TOKEN_S * plan.num_tokens if plan is not None else 0.0)
        if plan is not None:
            for request_id in scheduler.apply(_answer(plan, decodes), now_s).request_ids.tolist():
                rows[request_id].prefilled_s = rows[request_id].prefilled_s or now_s
        for request in scheduler.take_ended():
            rows[request.id].end_s = now_s
    run.rows = list(rows.values())
    return run


def _answer(plan: StepPlan, decodes: np.ndarray) -> StepResult:
    """A zero for every row that is due; `decodes` is kept from step to step."""
    decodes[plan.decode_leaves] = False
    decodes[plan.decode_joins] = True
    done = [chunk.slot for chunk in plan.prefill if chunk.samples]
    slots = np.concatenate([decodes.nonzero()[0], np.array(done, np.int64)])
    none, every = np.zeros(len(slots), np.bool_), np.ones(len(slots), np.bool_)
    return StepResult(plan.step, slots, np.zeros(len(slots), np.int64), none, every)


def draw(runs: list[Run]) -> str:
    """All runs, one below the other, as one SVG."""
    height = sum(HEAD + ROW * len(run.rows) for run in runs) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="13"'
        f' fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    top = 0
    for run in runs:
        lines.append(f'<text x="{LEFT}" y="{top + 22}"><tspan font-weight="bold">{run.policy}')
        lines.append(f"</tspan>: {CAPTIONS[run.policy]}</text>")
        for index, row in enumerate(run.rows):
            lines += _row(row, top + HEAD + ROW * index)
        top += HEAD + ROW * len(run.rows)
    for second in range(0, (WIDTH - LEFT) // SECOND, 2):
        lines.append(f'<text x="{LEFT + SECOND * second}" y="{height - 12}">{second} s</text>')
    return "\n".join([*lines, "</svg>\n"])


def _row(row: Row, y: float) -> list[str]:
    request = row.request
    if request.finish is Finish.DEADLINE and request.scheduled_s == 0.0:
        x = LEFT + SECOND * row.end_s
        cross = f"M{x - 3:.1f} {y} l6 5 m0 -5 l-6 5"
        return [f'<path d="{cross}" stroke="{row.colour}" stroke-width="2"/>']
    began_s, prefilled_s = request.scheduled_s, row.prefilled_s or row.end_s
    return [
        _bar(request.arrived_s, began_s, y, WAIT),
        _bar(began_s, prefilled_s, y, PREFILL),
        _bar(prefilled_s, row.end_s, y, row.colour),
    ]


def _bar(start_s: float, end_s: float, y: float, colour: str) -> str:
    x, width = LEFT + SECOND * start_s, SECOND * (end_s - start_s)
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 2}" fill="{colour}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("svg", type=Path, help="file to write")
    args = parser.parse_args()
    args.svg.write_text(draw([simulate(policy) for policy in POLICIES]))


if __name__ == "__main__":
    main()
