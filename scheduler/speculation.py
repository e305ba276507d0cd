"""Speculation: steps in which a slot draws several tokens, and how many is known afterwards.

Drafts of a request's next tokens come from elsewhere (a small model, the prompt itself). One step
computes the last token and its drafts together, and keeps the drafts up to the first wrong one and
the token that belongs there (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", ICML 2023). Example, start 20 and three drafts, of which one is right:

    position          20     21       22       23          planned: 4 tokens, computed = 24
    computed      last one   draft    draft    draft
    kept                     right    wrong                result: 2 tokens, computed = 22

So position 22 is computed again, with the token drawn there. Who drafts is not planned again until
the result is known; others run ahead meanwhile. What is computed beyond `computed` is worthless,
and never indexed by the prefix cache: it knows of tokens that were drawn.

Drafts come last. They take what prompts leave of a step's budget (a step full of prompts has no
time to give away), nobody yields blocks for them, and blocks taken for drafts are kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.plan import Rows, StepPlan, StepResult
from millrace.scheduler.slots import Slots, SlotTable


def plan_drafts(
    table: SlotTable, pool: BlockPool, plan: StepPlan, slots: Slots, budget: int
) -> None:
    """A token for each of these slots, which have room for it, and as many drafts as fit."""
    start = table.computed[slots]
    drafts = np.minimum(table.lookahead[slots], table.end[slots] - start - 1)
    before = np.cumsum(drafts) - drafts
    stop = start + 1 + np.clip(budget - before, 0, drafts)
    while len(short := slots[stop > table.capacity[slots]][: pool.num_available]):
        blocks = pool.take(len(short))
        assert blocks is not None, "no more are asked for than there are"
        plan.append_blocks(short, table.add_blocks(short, blocks), blocks)
    stop = np.minimum(stop, table.capacity[slots])
    plan.drafts = np.array((slots, start, stop - start), np.int32).T
    table.computed[slots] = stop
    table.last_step[slots] = plan.step
    table.speculates[slots] = 0


def settle(table: SlotTable, drafts: Rows, result: StepResult) -> Slots:
    """How far a step's drafts got; returns the slots that have drawn all their tokens by it.

    `result` has nothing behind an end any more (`up_to_ends`).
    """
    slots, start, _ = drafts.T
    kept = np.bincount(result.slots[result.ok], minlength=len(table.computed))
    table.computed[slots] = start + kept[slots]
    is_done = table.computed[slots] == table.end[slots]
    table.speculates[slots] = ~is_done
    done: Slots = slots[is_done].astype(np.intp)
    return done


def up_to_ends(result: StepResult) -> StepResult:
    """Without the tokens that come behind a stop token, or behind a failure, of the same slot."""
    is_end = result.stopped | ~result.ok
    ends_before: Slots = np.cumsum(is_end) - is_end  # in all rows
    is_kept: npt.NDArray[np.bool_] = ends_before == ends_before[first_of_run(result.slots)]
    return StepResult(
        result.step,
        result.slots[is_kept],
        result.token_ids[is_kept],
        result.stopped[is_kept],
        result.ok[is_kept],
    )


def first_of_run(slots: Slots) -> Slots:
    """For each row the first of those with the same slot. [3, 3, 5, 4, 4] -> [0, 0, 2, 3, 3]"""
    is_first = np.diff(slots, prepend=-1) != 0
    rows: Slots = np.maximum.accumulate(np.where(is_first, np.arange(len(slots)), 0))
    return rows
