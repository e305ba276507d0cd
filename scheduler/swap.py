"""HostPool: blocks in the host's memory, where a request that yields can leave its KV.

A request that yields is computed again when it returns. Where copying its blocks out and in takes
less time than that, by the cost model, they wait here instead:

    yields       `swap_out`    its blocks go out in the next plan, before anything takes their place
    returns      `swap_in`     what the prefix cache does not hold any more comes in
    ends         `drop`        its host blocks are free again

Blocks that others referenced too are left to the prefix cache: if they are gone when the request
returns, so is the use of what follows them, and it is computed from there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from millrace.scheduler.cost_model import CostModel
from millrace.scheduler.idle_blocks import BlockIds
from millrace.scheduler.plan import StepPlan
from millrace.scheduler.request import Request, Swapped


class HostPool:
    """`num_blocks` host blocks; one takes `copy_s` seconds on its way, either way."""

    def __init__(self, num_blocks: int, copy_s: float, cost: CostModel | None) -> None:
        self.num_blocks = num_blocks
        self.swap_outs: list[tuple[int, int]] = []  # (block, host block), for the next plan
        self.num_swapped_out = 0  # blocks since the start
        self.num_swapped_in = 0
        self._copy_s = copy_s
        self._cost = cost
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def swap_out(self, request: Request, blocks: BlockIds, first: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens' KV, in `blocks`, but for what lies before `first`.

        Unless it is cheaper to compute them again, or there is no room.
        """
        kept = blocks[first:].tolist()
        if not 0 < len(kept) <= len(self._free) or self._cost is None:
            return
        if 2 * len(kept) * self._copy_s >= self._cost.prompt_s(num_tokens):
            return
        places = [self._free.pop() for _ in kept]
        self.swap_outs += zip(kept, places, strict=True)
        self.num_swapped_out += len(kept)
        request.swapped = Swapped(first, places, num_tokens)

    def swap_in(self, plan: StepPlan, request: Request, num_hits: int, table: BlockIds) -> int:
        """Bring back what the `num_hits` cached blocks at the beginning of `table` leave out.

        Returns the tokens that are computed then; 0: nothing was kept that goes on from there.
        """
        swapped = request.swapped
        if swapped is None:
            return 0
        end = swapped.first + len(swapped.places)
        num_tokens = min(swapped.num_tokens, request.num_known - 1)
        useful = swapped.first <= num_hits < end
        if useful:
            plan.swap_ins += zip(
                swapped.places[num_hits - swapped.first :],
                table[num_hits:end].tolist(),
                strict=True,
            )
            self.num_swapped_in += end - num_hits
        self._free_places(request)
        return num_tokens if useful else 0

    def drop(self, request: Request) -> None:
        """It has ended: its host blocks are free again, and what was to be copied there is not."""
        if request.swapped is not None:
            places = set(request.swapped.places)
            self.swap_outs = [pair for pair in self.swap_outs if pair[1] not in places]
            self._free_places(request)

    def lose(self, requests: Iterable[Request]) -> None:
        """Copies of steps that are lost cannot be trusted: all is free again."""
        self.swap_outs = []
        for request in requests:
            self._free_places(request)

    def _free_places(self, request: Request) -> None:
        if request.swapped is not None:
            self._free += request.swapped.places
            request.swapped = None


def num_shared(refs: BlockIds) -> int:
    """How many blocks at the beginning of a table, by their reference counts, others hold too."""
    alone = refs <= 1
    return int(np.argmax(alone)) if alone.any() else len(refs)
