"""RequestTable: what the device knows of each running request, in dense tensors indexed by slot.

The host sends changes only (`changes.py`); tokens, positions, penalty counts and the end flag
advance on the device (`device_step.py`). No tensor here is ever replaced: captured graphs hold
their addresses. Rows of free slots hold whatever was there before: nothing reads them.

One slot more than requests can have is the scratch slot, for the rows that pad a batch: it has
ended, so it stands for ever at position 0. It owns no block: `device_step.py` writes none of its
keys and values down, and it attends to whatever block 0 holds. What it draws is of no account.

S slots (with the scratch slot), C = max_context tokens, M = blocks of a full context, V vocabulary.
"""

from __future__ import annotations

import torch

from millrace.engine.runner.logprobs import score_rows
from millrace.engine.sampling_params import MAX_LOGPROBS
from millrace.kernels.slot_sampling import FLAG_OF, SlotSampling

Views = dict[str, torch.Tensor]
DRAWN_ROWS = 3


class RequestTable:
    """Tokens, progress, block table and sampling parameters by slot; and who decodes."""

    def __init__(
        self,
        slots: int,
        max_context: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        num_slots = slots + 1

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        # One column more than the context: a step launched ahead may draw a token past its end.
        self.tokens = zeros(torch.int64, num_slots, max_context + 1)  # [S, C + 1]
        self.computed = zeros(torch.int64, num_slots)  # [S] tokens with KV
        self.ended = zeros(torch.bool, num_slots)  # [S] it has drawn a stop token, or could not
        self.block_table = zeros(torch.int32, num_slots, -(-max_context // block_size))  # [S, M]
        self.sampling = SlotSampling.zeros(num_slots, vocab_size, device)
        self.scratch_slot = slots
        self.ended[slots] = True
        # Of a step: the decoding slots, padded with the scratch slot, and what was drawn.
        self.decode_slots = zeros(torch.int64, slots).fill_(slots)  # [max_rows]
        # Of each row of a step: token id, stopped, ok; and below them, where somebody asks, the
        # token's scores as `logprobs.py` lays them out. One tensor, so that a fetch is one copy.
        self.num_top = min(MAX_LOGPROBS, vocab_size)
        self.results = zeros(torch.int64, DRAWN_ROWS + score_rows(self.num_top), slots)
        self.drawn, self.scores = self.results[:DRAWN_ROWS], self.results[DRAWN_ROWS:]

    def apply(self, changes: Views) -> None:
        """Take in admissions, new blocks and who decodes, each where there are any."""
        if "admitted" in changes:
            self._admit(changes)
        if "blocks" in changes:
            self.block_table.view(-1)[changes["block_places"]] = changes["blocks"]
        if "decode_slots" in changes:
            self.decode_slots.copy_(changes["decode_slots"])

    def _admit(self, changes: Views) -> None:
        slots = changes["admitted"]
        self.tokens.view(-1)[changes["token_places"]] = changes["tokens"].long()
        self.computed[slots] = changes["starts"]
        self.ended[slots] = False
        for name, rows in changes.items():
            kind, _, field = name.partition(".")
            if kind == "sampling":
                getattr(self.sampling, field)[slots] = rows
            elif kind == "wide":
                getattr(self.sampling, field)[changes[f"slots.{FLAG_OF[field]}"]] = rows

    def addresses(self) -> list[int]:
        """Where each tensor lies: must be the same for as long as a graph is captured."""
        own = (self.tokens, self.computed, self.ended, self.block_table, self.decode_slots)
        parameters = (value for value in vars(self.sampling).values())
        return [tensor.data_ptr() for tensor in (*own, self.results, *parameters)]
