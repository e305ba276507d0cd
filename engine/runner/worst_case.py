"""The largest step that the settings allow, run once: what it takes, every other step can have.

A full batch decodes at the end of its context, with every filter of the sampler at work, and beside
it prompts fill the step's budget of tokens. What is computed is garbage, and the blocks of the
contexts are whatever blocks there are, over and over. It also launches the kernels of eager steps
once, so that they are not compiled while serving.
"""

from __future__ import annotations

import numpy as np
import torch

from millrace.engine.runner.changes import ChangePacker
from millrace.engine.runner.copies import Copies
from millrace.engine.runner.device_step import DeviceStep
from millrace.engine.runner.graphs import Draws
from millrace.engine.runner.packed import PackedArrays
from millrace.engine.runner.request_table import RequestTable
from millrace.kernels.slot_sampling import (
    HEAD_FILTERS,
    NO_FILTERS,
    NO_LOGPROBS,
    RAW_LOGPROBS,
)
from millrace.scheduler.plan import PrefillChunk

TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY = 1.0, 50, 0.9, 0.01, 1.1


@torch.inference_mode()
def run_worst_case(step: DeviceStep, copies: Copies, max_step_tokens: int) -> None:
    """Run the largest step. Nobody may own a slot, and nobody notices afterwards."""
    table = step.table
    max_context = table.tokens.shape[1] - 1
    chunks = largest_chunks(table.scratch_slot, max_context, max_step_tokens)
    decodes = np.arange(table.scratch_slot - len(chunks))
    packer = ChangePacker(max_context + 1, table.block_table.shape[1], table.sampling.vocab)
    packed = PackedArrays()
    packer.chunk_rows(decodes, chunks, packed)
    rows = packed.views(copies.send(packed))
    every_block = torch.arange(table.block_table.shape[1], dtype=torch.int32) % step.num_blocks
    table.block_table[: table.scratch_slot] = every_block.to(table.block_table.device)
    longest = max((chunk.length for chunk in chunks), default=1)
    _set(table, max_context - 1, TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY)
    table.sampling.logprobs[: table.scratch_slot] = RAW_LOGPROBS
    step.mixed(rows, len(decodes), longest, max_context, Draws.SCORED)
    copies.fetch(table.results).wait()
    _set(table, 0, 0.0, 0, 1.0, 0.0, 1.0)
    table.sampling.logprobs[: table.scratch_slot] = NO_LOGPROBS
    table.ended[: table.scratch_slot] = False


def largest_chunks(slots: int, max_context: int, max_step_tokens: int) -> list[PrefillChunk]:
    """Chunks that end at the context's end and fill the step beside decodes in the other slots."""
    chunks: list[PrefillChunk] = []
    left = max_step_tokens
    # Each chunk takes a slot from the decodes, from the last one down.
    while (
        len(chunks) < slots and (length := min(left - (slots - len(chunks) - 1), max_context)) > 0
    ):
        slot = slots - len(chunks) - 1
        chunks.append(PrefillChunk(slot, max_context - length, length, samples=True))
        left -= length
        if length < max_context:
            break
    return chunks


def _set(
    table: RequestTable,
    computed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    """Give every slot but the scratch slot these values."""
    sampling, own = table.sampling, slice(0, table.scratch_slot)
    table.computed[own] = computed
    sampling.temperature[own] = temperature
    sampling.top_k[own] = top_k
    sampling.top_p[own] = top_p
    sampling.min_p[own] = min_p
    sampling.filter_kind[own] = HEAD_FILTERS if top_k else NO_FILTERS
    sampling.repetition_penalty[own] = penalty
    sampling.has_penalties[own] = penalty != 1.0
    sampling.output_counts[own] = 0
