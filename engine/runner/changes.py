"""From a StepPlan to what the device must be told of it: arrays, to be sent in one copy.

The device knows each running request's tokens, position, blocks and parameters, and moves them on
by itself. So a step in which the same slots decode inside their blocks has nothing to tell, and
sends nothing. C tokens and M blocks of a full context, A admissions, V vocabulary.

    what changed         arrays
    admissions           admitted [A], starts [A]; token_places, tokens [their tokens];
                         sampling.<field> [A, ...]; of tables over the vocabulary only the rows
                         whose flag is set: slots.<flag> [W], wide.<field> [W, ...]
    new blocks           block_places, blocks [n]: places in the flattened block table
    decoding slots       decode_slots [max_rows], padded with the scratch slot
    prefill chunks       slots, query_start, ends: rows; token_slots, positions: tokens;
                         last_tokens, drawing_slots: rows that draw

Example, two decoding slots 4 and 6 beside a chunk of slot 1 that computes positions 16..18 and
samples; C + 1 = 513:

    slots [4, 6, 1]         query_start [0, 1, 2, 5]     ends [19]
    token_slots [4, 6, 1, 1, 1]                          positions [16, 17, 18]
    last_tokens [0, 1, 4]   drawing_slots [4, 6, 1]
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from millrace.engine.core.messages import NewRequest
from millrace.engine.runner.packed import PackedArrays
from millrace.kernels.sampling import GREEDY_BELOW
from millrace.kernels.slot_sampling import (
    FLAG_OF,
    NO_FILTERS,
    NO_LOGPROBS,
    PROCESSED_LOGPROBS,
    RAW_LOGPROBS,
    SlotSampling,
    SlotValues,
)
from millrace.scheduler.plan import PrefillChunk, StepPlan
from millrace.scheduler.request import Request

Slots = npt.NDArray[np.int64]

LOGPROB_KINDS = {"raw": RAW_LOGPROBS, "processed": PROCESSED_LOGPROBS}


class ChangePacker:
    """Packs changes for tables of one shape. Holds scratch space and no state of requests."""

    def __init__(self, row_tokens: int, row_blocks: int, vocab_size: int) -> None:
        self._row_tokens = row_tokens  # C + 1, the table's width
        self._row_blocks = row_blocks  # M
        self._values = SlotSampling.zeros(1, vocab_size)  # one request's, checked and laid out

    def table_changes(self, plan: StepPlan, packed: PackedArrays) -> None:
        """Admissions and new blocks.

        Raises:
            NotImplementedError: the plan has drafts: this runner draws one token a slot.
        """
        if len(plan.drafts):
            slots = plan.drafts[:, 0].tolist()
            raise NotImplementedError(f"step {plan.step} checks drafts in slots {slots}")
        if len(plan.block_appends):
            slots, indices, blocks = plan.block_appends.T
            packed.add("block_places", slots.astype(np.int64) * self._row_blocks + indices)
            packed.add("blocks", blocks)
        if plan.admitted:
            self._admissions(plan, packed)

    def _admissions(self, plan: StepPlan, packed: PackedArrays) -> None:
        start_of = {chunk.slot: chunk.start for chunk in plan.prefill}
        slots = [request.slot for request in plan.admitted]
        known = [request.known_tokens() for request in plan.admitted]
        places = [
            slot * self._row_tokens + np.arange(len(tokens))
            for slot, tokens in zip(slots, known, strict=True)
        ]
        packed.add("admitted", np.array(slots, np.int64))
        packed.add("starts", np.array([start_of[slot] for slot in slots], np.int64))
        packed.add("token_places", np.concatenate(places))
        packed.add("tokens", np.concatenate(known))
        self._sampling(plan.admitted, packed)

    def _sampling(self, admitted: list[Request], packed: PackedArrays) -> None:
        """Each field of SlotSampling as rows; the wide ones only of requests that have its flag."""
        fields = {f.name: getattr(self._values, f.name) for f in dataclasses.fields(SlotSampling)}
        rows: dict[str, list[npt.NDArray[np.generic]]] = {name: [] for name in fields}
        flagged: dict[str, list[int]] = {flag: [] for flag in FLAG_OF.values()}
        for request in admitted:
            self._values.write(0, slot_values(request))
            for flag, slots in flagged.items():
                slots += [request.slot] if fields[flag][0] else []
            for name, field in fields.items():
                if name not in FLAG_OF or fields[FLAG_OF[name]][0]:
                    rows[name].append(field[0].numpy().copy())
        for flag, slots in flagged.items():
            if slots:
                packed.add(f"slots.{flag}", np.array(slots, np.int64))
        for name in fields:
            if rows[name]:
                prefix = "wide" if name in FLAG_OF else "sampling"
                packed.add(f"{prefix}.{name}", np.stack(rows[name]))

    def chunk_rows(
        self, decode_slots: Slots, chunks: list[PrefillChunk], packed: PackedArrays
    ) -> None:
        """The rows of a step that decodes `decode_slots` and computes `chunks`."""
        num_decodes = len(decode_slots)
        chunk_slots = np.array([chunk.slot for chunk in chunks], np.int64)
        lengths = np.array([chunk.length for chunk in chunks], np.int64)
        samples = np.array([chunk.samples for chunk in chunks], np.bool_)
        chunk_ends = num_decodes + np.cumsum(lengths)  # of their tokens in the batch
        starts = np.arange(num_decodes + 1)
        positions = [np.arange(chunk.start, chunk.start + chunk.length) for chunk in chunks]
        packed.add("slots", np.concatenate([decode_slots, chunk_slots]))
        packed.add("query_start", np.concatenate([starts, chunk_ends]).astype(np.int32))
        packed.add("ends", np.array([chunk.start + chunk.length for chunk in chunks], np.int64))
        packed.add("token_slots", np.concatenate([decode_slots, np.repeat(chunk_slots, lengths)]))
        packed.add("positions", np.concatenate(positions))
        packed.add("last_tokens", np.concatenate([starts[:-1], chunk_ends[samples] - 1]))
        packed.add("drawing_slots", np.concatenate([decode_slots, chunk_slots[samples]]))


def is_plain(request: Request) -> bool:
    """Whether a temperature is all that its draws need: no filter, no edit of the logits."""
    settings = request.payload
    assert isinstance(settings, NewRequest), "the engine submits NewRequests"
    values = slot_values(request)
    filtered = values.filter_kind != NO_FILTERS and values.temperature >= GREEDY_BELOW
    bans_stops = settings.params.min_tokens and settings.stop_token_ids
    edited = values.has_bias or values.has_bans or values.has_penalties or bans_stops
    return not (filtered or edited)


def slot_values(request: Request) -> SlotValues:
    """The sampler's view of a request's parameters.

    A request that returns after a preemption brings output tokens along; they count for the
    penalties exactly as when they were drawn.
    """
    settings = request.payload
    assert isinstance(settings, NewRequest), "the engine submits NewRequests"
    params = settings.params
    penalised = (
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )
    return SlotValues(
        temperature=params.temperature,
        temperature_last=params.temperature_last,
        top_n_sigma=params.top_n_sigma,
        top_k=max(params.top_k, 0),
        typical_p=params.typical_p,
        top_p=params.top_p,
        min_p=params.min_p,
        xtc_probability=params.xtc_probability,
        xtc_threshold=params.xtc_threshold,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logprobs=NO_LOGPROBS if params.logprobs is None else LOGPROB_KINDS[params.logprobs_mode],
        seed=params.seed or 0,
        bias=dict(params.logit_bias or {})
        | dict.fromkeys(params.banned_token_ids or (), -math.inf),
        allowed_ids=params.allowed_token_ids,
        stop_ids=settings.stop_token_ids,
        min_position=len(request.prompt) + params.min_tokens,
        prompt_ids=request.prompt.tolist() if penalised else (),
        output_ids=request.outputs if penalised else (),
    )
