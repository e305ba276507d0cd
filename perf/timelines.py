"""One picture a policy: the same crowd served by each, drawn from runs of the engine.

    python -m millrace.perf.timelines docs          # docs/timeline-<policy>.png, four of them

The whole engine in this process, on the built-in model: ten requests of one tenant, and behind them
four of another, on four slots. Requests arrive at given steps, and what the policies measure in
seconds (aging, deadlines) is given in steps too, by how long a step took before: so the pictures
count steps, and are about the same on any machine. `millrace.perf.sim.timeline` draws the like in
virtual time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from millrace.engine.config import POLICIES, EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.messages import NewRequest, StepOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.weights.locate import resolve
from millrace.scheduler.request import NO_SLOT

SLOTS, STEP_TOKENS = 4, 64
PROMPT_TOKENS, OUTPUT_TOKENS = 48, 12
VOCAB = 40_000  # any id below the model's own
WARM_UP_REQUESTS = 2
AGING_STEPS, PATIENCE_STEPS, TOO_SHORT_STEPS = 20.0, 40.0, 1.5
MANY, FEW = "many", "few"  # the tenants
COLOURS = {MANY: "#3b6ea8", FEW: "#d9822b"}
WAIT_COLOUR, PROMPT_COLOUR = "#d5dae1", "#1f2933"
CAPTIONS = {
    "first_come": "in order of arrival",
    "priority": "class 0 (orange) before class 1 (blue), which ages",
    "fair_share": "the tenant given least is next; while it runs nothing, it waits for no slot",
    "deadline": "orange is due and goes first; a cross: shed, as it could not make it",
}


class State(StrEnum):
    """What a request did in a step."""

    WAIT = "waits"
    PROMPT = "prompt"
    DECODE = "decodes"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the crowd."""

    step: int
    tenant: str
    priority: int
    patience_steps: float | None = None  # of its deadline, where the policy is "deadline"


@dataclass(slots=True)
class Row:
    """What became of one request."""

    tenant: str
    spans: list[tuple[State, int, int]] = field(default_factory=list)  # from step, to step
    num_preemptions: int = 0
    finish: str = ""
    has_prompt: bool = False  # its prompt is computed, since it last got a slot

    def add(self, state: State, step: int) -> None:
        """Go on with the last span, or begin another."""
        start = self.spans.pop()[1] if self.spans and self.spans[-1][0] is state else step
        self.spans.append((state, start, step + 1))


def crowd() -> list[Arrival]:
    """Ten of one tenant at once; four of another, one at a time behind them."""
    few = [Arrival(9 + 8 * index, FEW, 0, PATIENCE_STEPS) for index in range(4)]
    few[-1] = Arrival(few[-1].step, FEW, 0, TOO_SHORT_STEPS)
    return sorted([Arrival(index // 2, MANY, 1) for index in range(10)] + few, key=lambda a: a.step)


class Engine:
    """A core under one policy, and what came of each request."""

    def __init__(self, policy: str, step_s: float) -> None:
        """`step_s`: how long a step takes, for what the policy measures in seconds."""
        config = EngineConfig(
            policy=policy,
            priority_aging_s=AGING_STEPS * step_s,
            max_running=SLOTS,
            max_step_tokens=STEP_TOKENS,
        )
        self._core, _ = build_core(config, resolve(config.model, config.revision))
        self._has_deadlines = policy == "deadline"
        self._step_s = step_s
        self._rng = np.random.default_rng(0)
        self._num_submitted = 0
        self.steps_s: list[float] = []
        for _ in range(WARM_UP_REQUESTS):  # also teaches the cost model
            self._submit(Arrival(0, MANY, 0))
        while not self._core.is_idle:
            self._step({}, 0)

    def serve(self, arrivals: list[Arrival]) -> list[Row]:
        """Run until all have ended."""
        rows: dict[int, Row] = {}
        coming, num_steps = list(arrivals), 0
        while coming or not self._core.is_idle:
            while coming and coming[0].step <= num_steps:
                arrival = coming.pop(0)
                rows[self._submit(arrival)] = Row(arrival.tenant)
            self._step(rows, num_steps)
            num_steps += 1
        return list(rows.values())

    def _submit(self, arrival: Arrival) -> int:
        now_s, patience = time.monotonic(), arrival.patience_steps
        has_deadline = self._has_deadlines and patience is not None
        deadline_s = now_s + patience * self._step_s if has_deadline and patience else None
        self._num_submitted += 1
        self._core.handle(
            NewRequest(
                id=self._num_submitted,
                prompt=self._rng.integers(0, VOCAB, PROMPT_TOKENS).astype("<i4").tobytes(),
                params=SamplingParams(temperature=0.0, seed=0, max_tokens=OUTPUT_TOKENS),
                max_tokens=OUTPUT_TOKENS,
                stop_token_ids=[],
                arrival_s=now_s,
                deadline_s=deadline_s,
                priority=arrival.priority,
                tenant=arrival.tenant,
            )
        )
        return self._num_submitted

    def _step(self, rows: dict[int, Row], step: int) -> None:
        """One step, and what each request did in it."""
        began_s = time.monotonic()
        live = dict(self._core.scheduler.requests)
        outputs = [message for message in self._core.step() if isinstance(message, StepOutput)]
        self.steps_s.append(time.monotonic() - began_s)
        deltas = {delta.id: delta for output in outputs for delta in output.deltas}
        for request_id, row in rows.items():
            request, delta = live.get(request_id), deltas.get(request_id)
            if request is None:
                continue
            has_drawn = delta is not None and bool(delta.token_ids)
            if request.num_preemptions > row.num_preemptions:
                row.num_preemptions, row.has_prompt = request.num_preemptions, False
            if has_drawn and row.has_prompt:
                row.add(State.DECODE, step)
            elif has_drawn or request.slot != NO_SLOT:
                row.add(State.PROMPT, step)
                row.has_prompt = has_drawn
            else:
                row.add(State.WAIT, step)
            if delta is not None and delta.finish is not None:
                row.finish = delta.finish


def draw(policy: str, rows: list[Row], path: Path) -> None:
    """A bar for each request, in order of arrival, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes: Any = figure.subplots()
    for index, row in enumerate(rows):
        colours = {State.WAIT: WAIT_COLOUR, State.PROMPT: PROMPT_COLOUR}
        for state, start, end in row.spans:
            colour = colours.get(state, COLOURS[row.tenant])
            axes.broken_barh([(start, end - start)], (index - 0.4, 0.8), facecolors=colour)
        if row.finish == "deadline":
            axes.plot(row.spans[-1][2], index, "x", color=COLOURS[row.tenant], markersize=8, mew=2)
    names = {WAIT_COLOUR: "waits", PROMPT_COLOUR: "prompt"}
    names |= {COLOURS[MANY]: "decodes: ten of one tenant", COLOURS[FEW]: "decodes: four of another"}
    legend = [Patch(color=colour, label=name) for colour, name in names.items()]
    axes.legend(handles=legend, loc="lower left", fontsize=8, frameon=False)
    axes.set_title(f"{policy}: {CAPTIONS[policy]}", loc="left", fontsize=10)
    axes.set_xlabel("steps")
    axes.set_yticks([])
    axes.set_xlim(0, None)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write timeline-<policy>.png")
    folder: Path = parser.parse_args().folder
    step_s = 0.0  # first come, first served does not ask
    for policy in POLICIES:
        engine = Engine(policy, step_s)
        rows = engine.serve(crowd())
        step_s = statistics.median(engine.steps_s)
        path = folder / f"timeline-{policy}.png"
        draw(policy, rows, path)
        print(f"{path}: {len(rows)} requests, {len(engine.steps_s)} steps of {step_s:.3f} s")


if __name__ == "__main__":
    main()
