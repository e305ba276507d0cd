"""DecodeSet: the slots that decode a token a step, as the runner knows them and as they are to be.

A runner goes on decoding the same slots until it is told otherwise. So a plan names who joins and
who leaves, and a step in which nobody does costs nothing here.
"""

from __future__ import annotations

import numpy as np

from millrace.scheduler.plan import StepPlan
from millrace.scheduler.slots import Slots, SlotTable


class DecodeSet:
    """`SlotTable.decodes`, and what of it has been told. Changed by the scheduler alone."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._told = table.decodes.copy()  # of the newest step
        self._num_told = 0
        self._step = 0  # the newest one
        self._is_changed = False  # perhaps others are to decode than in the newest step
        self._last_draws: dict[int, list[int]] = {}  # slots, by the step of their last token

    def join(self, slot: int) -> None:
        """From the next step on."""
        self._table.decodes[slot] = 1
        self._is_changed = True

    def leave(self, slot: int) -> None:
        self._table.decodes[slot] = 0
        self._is_changed = True

    def advance(self, plan: StepPlan, stalled: list[int]) -> None:
        """Everyone computes a token, but for the stalled, who try again in the next step."""
        table, decodes = self._table, self._table.decodes
        if stalled:
            decodes = decodes.copy()
            decodes[stalled] = 0
        plan.num_decodes = self._num_told
        if self._is_changed or stalled:
            changed = (decodes != self._told).nonzero()[0]
            is_join = decodes[changed] != 0
            leaves = changed[~is_join]
            table.last_step[leaves] = self._step
            plan.decode_leaves = leaves.tolist()
            plan.decode_joins = changed[is_join].tolist()
            plan.num_decodes = int(np.count_nonzero(decodes))
        self._is_changed = bool(stalled)
        table.computed += decodes
        ending = (table.computed == table.end).nonzero()[0]
        if len(ending):
            self._end(plan.step, ending[decodes[ending] != 0])

    def _end(self, step: int, slots: Slots) -> None:
        """These draw their last token in this step, and are not planned past it."""
        if len(slots):
            self._table.decodes[slots] = 0
            self._is_changed = True
            self.draw_last(step, slots.tolist())

    def draw_last(self, step: int, slots: list[int]) -> None:
        """With the tokens of this step, these slots have all of theirs."""
        self._last_draws.setdefault(step, []).extend(slots)

    def pop_last_draws(self, step: int) -> list[int]:
        return self._last_draws.pop(step, [])

    def commit(self, plan: StepPlan) -> None:
        """The plan goes to the runner."""
        if plan.decode_leaves or plan.decode_joins:
            self._told[plan.decode_leaves] = 0
            self._told[plan.decode_joins] = 1
        self._num_told, self._step = plan.num_decodes, plan.step

    def withdraw(self) -> None:
        """The plan is none: the runner will not hear of it."""
        self._is_changed = True

    def forget(self) -> None:
        """The runner has been told to decode nobody."""
        self._told[:] = 0
        self._num_told = 0
        self._is_changed = True
        self._last_draws.clear()

    def last_step(self, slot: int) -> int:
        """The newest launched step with this slot."""
        return self._step if self._told[slot] else int(self._table.last_step[slot])
