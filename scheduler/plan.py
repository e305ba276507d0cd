"""StepPlan and StepResult: the contract between the scheduler and whatever runs the steps.

Both speak of slots, not of requests: a slot's state lives with the runner, and a plan carries only
what changed. A step in which every request merely decodes inside its block is an empty change.

Example, block_size 16. Slot 3 holds a prompt of 20 tokens, admitted in step 7 with budget 16:

    step 7: admitted=[r], block_appends=[[3,0,41],[3,1,9]], prefill=[(3, start 0, length 16, False)]
    step 8: prefill=[(3, start 16, length 4, samples=True)]        -> result: token 20 of slot 3
    step 9: decode_joins=[3]                                       -> token 21
    ...
    step 21: block_appends=[[3,2,17]]: position 32 is the first of block 2
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from millrace.scheduler.request import Request

Rows = npt.NDArray[np.int32]
NO_ROWS: Rows = np.empty((0, 3), np.int32)
NO_ROWS.flags.writeable = False


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + length) of a slot; draw the next token if `samples`."""

    slot: int
    start: int
    length: int
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """What one step does, as changes to the step before. Apply the fields in this order.

    Decoding slots go on from step to step. `drafts` are of this step alone: compute the positions
    [start, start + length) of a slot, that is its last token and length - 1 drafts of what may come
    next, and keep what the model itself would have drawn: the drafts up to the first wrong one, and
    one token more. Fewer drafts are right, too.

    A chunk may start behind shared blocks that another chunk of the same step fills. So in each
    layer the KV of all the step's tokens is written before any of it is read. Whole blocks are
    moved before that, in the order of the fields. Of the copies all sources are read before any
    destination is written, for one may be the other.
    """

    step: int
    released: list[int] = field(default_factory=list)  # slots whose request is gone
    admitted: list[Request] = field(default_factory=list)  # `prefill` says where they start
    block_appends: Rows = field(default_factory=lambda: NO_ROWS)  # [n, 3]: slot, index, block
    swap_outs: list[tuple[int, int]] = field(default_factory=list)  # (block, host block)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)  # (host block, block)
    prefill: list[PrefillChunk] = field(default_factory=list)
    decode_leaves: list[int] = field(default_factory=list)  # slots
    decode_joins: list[int] = field(default_factory=list)  # slots
    drafts: Rows = field(default_factory=lambda: NO_ROWS)  # [d, 3]: slot, start, length
    num_decodes: int = 0  # slots that decode one token in this step
    context_tokens: int = 0  # KV that these read; counted where a cost model asks for it

    def append_blocks(
        self, slots: npt.NDArray[np.intp] | int, index: npt.NDArray[np.intp], blocks: Rows
    ) -> None:
        """These blocks [n] come to these slots ([n], or one) at these indices of their tables."""
        rows = np.empty((len(blocks), 3), np.int32)
        rows[:, 0], rows[:, 1], rows[:, 2] = slots, index, blocks
        before = self.block_appends
        self.block_appends = np.concatenate((before, rows)) if len(before) else rows

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        drafted = int(self.drafts[:, 2].sum())
        return self.num_decodes + drafted + sum(chunk.length for chunk in self.prefill)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew: a token for each decoding slot and each chunk with `samples`.

    A slot of `drafts` is there once for each token that it keeps, one to `length`, in their order
    and one right after the other. The arrays stay as they are from here on.
    """

    step: int
    slots: npt.NDArray[np.int64]  # [N]
    token_ids: npt.NDArray[np.int64]  # [N]
    stopped: npt.NDArray[np.bool_]  # [N]; the token is a stop token of its request
    ok: npt.NDArray[np.bool_]  # [N]; False: no token could be drawn (NaN, nothing allowed)


class Drawn(NamedTuple):
    """The tokens of one step that reach their requests; those of the ended are left out."""

    request_ids: npt.NDArray[np.int64]  # [n], one for each token
    token_ids: npt.NDArray[np.int64]  # [n]
