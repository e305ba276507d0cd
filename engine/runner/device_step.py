"""DeviceStep: a step on the device, from embedding to drawn token, without a word from the host.

    decode(shape)  the first rows of table.decode_slots, one token each: reads and writes the table
                   and the KV cache alone, all at fixed addresses, so that a graph can replay it
    mixed(...)     decoding rows and prefill chunks together, as the host's arrays describe them

A row goes on where its slot stands: position p = computed[slot] is computed from tokens[slot, p],
the drawn token is written to tokens[slot, p + 1], and computed moves to p + 1. A slot that has
ended (it drew a stop token, or none could be drawn) stays where it is: it computes the same
position into the same place again. So steps that were launched before the host knew do no harm.
Rows that pad a batch belong to the scratch slot, and write nothing to the cache.

R rows, T tokens, N rows that draw, V vocabulary, P tokens per block.
"""

from __future__ import annotations

import torch

from millrace.engine.models.decoder import Decoder
from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.runner.graphs import Draws, StepShape
from millrace.engine.runner.logprobs import write_scores
from millrace.engine.runner.request_table import RequestTable, Views
from millrace.kernels.attention import AttentionBatch
from millrace.kernels.dispatch import Operations

PADDING = -1  # in place of a row of the cache: kernels/kv_append.py writes none


class DeviceStep:
    """One model's step over one table and one KV cache."""

    def __init__(
        self, model: Decoder, operations: Operations, kv: KVCache, table: RequestTable
    ) -> None:
        self.model = model
        self.table = table
        self.operations = operations
        self.kv = kv
        self.num_blocks, self._block_size = kv.keys[0].shape[:2]
        max_rows = table.drawn.shape[1]
        self._query_start = torch.arange(
            max_rows + 1, dtype=torch.int32, device=table.computed.device
        )

    @torch.inference_mode()
    def decode(self, shape: StepShape) -> None:
        """One token for each of the first `shape.rows` rows of decode_slots."""
        table = self.table
        slots = table.decode_slots[: shape.rows]
        positions = table.computed[slots]
        attention = AttentionBatch(
            block_table=table.block_table,
            slots=slots,
            query_start=self._query_start[: shape.rows + 1],
            context_lens=(positions + 1).to(torch.int32),
            max_query_len=1,
            max_context_len=shape.context,
            num_decodes=shape.rows,
        )
        hidden = self._forward(slots, positions, attention)
        going = ~table.ended[slots]  # as of before this draw
        self._draw(hidden, slots, positions + 1, shape.draws)
        table.computed[slots] = positions + going

    @torch.inference_mode()
    def mixed(
        self,
        rows: Views,
        num_decodes: int,
        max_query: int,
        max_context: int,
        draws: Draws,
    ) -> torch.Tensor:
        """The rows of `ChangePacker.chunk_rows`: `num_decodes` decoding ones, then the chunks.

        `draws` is of the rows that draw. Returns the hidden states [T, E].
        """
        table, slots = self.table, rows["slots"]
        decodes, chunks = slots[:num_decodes], slots[num_decodes:]
        decoded = table.computed[decodes]
        positions = torch.cat([decoded, rows["positions"]])  # [T]
        attention = AttentionBatch(
            block_table=table.block_table,
            slots=slots,
            query_start=rows["query_start"],
            context_lens=torch.cat([decoded + 1, rows["ends"]]).to(torch.int32),
            max_query_len=max_query,
            max_context_len=max_context,
            num_decodes=num_decodes,
        )
        hidden = self._forward(rows["token_slots"], positions, attention)
        last = rows["last_tokens"]
        going = ~table.ended[decodes]
        if len(last):  # else no prompt ends here
            self._draw(hidden[last], rows["drawing_slots"], positions[last] + 1, draws)
        table.computed[decodes] = decoded + going
        table.computed[chunks] = rows["ends"]
        return hidden

    def addresses(self) -> list[int]:
        """Where every tensor lies that a decode step uses, but for weights and what it makes."""
        cache = [tensor.data_ptr() for tensor in (*self.kv.keys, *self.kv.values)]
        return [*self.table.addresses(), self._query_start.data_ptr(), *cache]

    def _forward(
        self, slots: torch.Tensor, positions: torch.Tensor, attention: AttentionBatch
    ) -> torch.Tensor:
        """Hidden states [T, E] of the tokens at `positions` of `slots`, both [T]."""
        table = self.table
        blocks = table.block_table[slots, positions // self._block_size].long()
        rows = blocks * self._block_size + positions % self._block_size
        batch = ForwardBatch(
            token_ids=table.tokens[slots, positions],
            positions=positions,
            write_index=torch.where(slots == table.scratch_slot, PADDING, rows),
            attention=attention,
        )
        return self.model.forward(batch, self.kv)

    def _draw(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        draws: Draws,
    ) -> None:
        """Draw the tokens at `positions` [N] of `slots` [N] from hidden [N, E] into the table."""
        table, is_plain, is_scored = self.table, draws is Draws.PLAIN, draws is Draws.SCORED
        if is_plain and len(slots) <= self.model.draw_rows:
            sampled = self.model.draw(hidden, slots, positions, table.sampling)
        else:
            inputs = (self.model.logits(hidden), slots, positions, table.sampling)
            sampled = self.operations.sample(*inputs, scored=is_scored, plain=is_plain)
            if is_scored:  # before the tokens count for the penalties
                scores = self.operations.drawn_logprobs(*inputs, sampled, table.num_top)
                write_scores(scores, table.scores[:, : len(slots)])
        table.tokens[slots, positions] = sampled.token_ids
        table.sampling.record(slots, sampled.token_ids)
        stopped = (table.sampling.stop_ids[slots] == sampled.token_ids[:, None]).any(dim=1)
        table.ended[slots] |= stopped | ~sampled.ok
        drawn = table.drawn[:, : len(slots)]
        drawn[0] = sampled.token_ids
        drawn[1] = stopped
        drawn[2] = sampled.ok
