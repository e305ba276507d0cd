"""Logits to token ids at a vocabulary of 128k: plain, and with filters and logprobs.

Bytes: 4 R V, the float32 logits of R rows read once, and R V / 8 where bans are read beside them;
all else is small. So a share of 1 / 1.15 is "within 1.15 times one read of the logits". Logits
rotate, the parameters do not: a server's slots stay where they are. A batch of 1 reads half a
megabyte, less than any launch takes: there `share_at_size`, beside a copy of as many bytes, says
more.

    plain         temperature 1, no filter
    bans          the same, with a mask of the tokens that may be drawn
    top-k top-p   k = 50, p = 0.95, and the raw logprobs of the token and of the 5 best
    top-p         p = 0.95 alone, and the same logprobs
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from millrace.kernels.dispatch import Operations, operations
from millrace.kernels.slot_sampling import NO_FILTERS, RAW_LOGPROBS, SlotValues
from millrace.kernels.token_mask import words_of
from millrace.perf.kernels.case import OURS, Call, Case, Outputs, Prepare, close_to
from millrace.perf.kernels.logits import Mode, SamplingInputs, sampling_inputs, slot_table
from millrace.perf.kernels.providers import ours
from millrace.perf.kernels.sampling_peers import NUM_TOP, flashinfer, torch_sort
from millrace.perf.kernels.session import Session

PLAIN = SlotValues(temperature=1.0)
BANS = SlotValues(temperature=1.0, bias=dict.fromkeys(range(0, 5000, 7), -math.inf))
TOP_K_TOP_P = SlotValues(temperature=1.0, top_k=50, top_p=0.95, logprobs=RAW_LOGPROBS)
TOP_P = SlotValues(temperature=1.0, top_p=0.95, logprobs=RAW_LOGPROBS)
MODES = (
    Mode("plain", "real", PLAIN, logprobs=False, goal=1 / 1.15),
    Mode("bans", "real", BANS, logprobs=False, goal=1 / 1.15),
    Mode("top-k top-p", "real", TOP_K_TOP_P, logprobs=True, goal=1 / 1.6),
    Mode("top-p", "real", TOP_P, logprobs=True, goal=1 / 1.6),
    Mode("top-k top-p", "flat", TOP_K_TOP_P, logprobs=True, goal=1 / 4),
    Mode("top-p", "flat", TOP_P, logprobs=True, goal=1 / 4),
)
VOCAB, BATCHES, SMALL_ROWS = 128256, (1, 8, 64, 256), 5
DRY_MODES, DRY_VOCAB, DRY_ROWS = MODES[:3], 5000, 1
TOLERANCE = 1e-5  # of logprobs, float32


def run(session: Session) -> None:
    session.measure_all(cases(session.device, session.dry_run))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    vocab, small = (DRY_VOCAB, DRY_ROWS) if dry_run else (VOCAB, SMALL_ROWS)
    for batch in (DRY_ROWS,) if dry_run else BATCHES:
        for mode in DRY_MODES if dry_run else MODES:
            yield _case(mode, batch, small, vocab, device)


def _case(mode: Mode, batch: int, small: int, vocab: int, device: torch.device) -> Case:
    mask_words = words_of(vocab) if mode.values.has_bans else 0
    return Case(
        kernel="sampling",
        name=f"{mode.name}, {mode.rows} rows, b{batch}",
        bytes=batch * (vocab + mask_words) * torch.float32.itemsize,
        flops=0,
        bound="memory",
        goal=mode.goal,
        make=partial(sampling_inputs, mode, slot_table(mode, batch, vocab, device)),
        make_small=partial(sampling_inputs, mode, slot_table(mode, small, vocab, device)),
        reference=_bind(operations(device, "reference")),
        providers={
            OURS: ours(device, "sample", _bind),
            "torch sort": torch_sort(),
            "FlashInfer": flashinfer(device),
        },
        check=close_to(TOLERANCE),
        axes={"batch": batch, "vocab": vocab},
    )


def _bind(table: Operations) -> Prepare:
    def prepare(x: SamplingInputs) -> Call:
        def call() -> Outputs:
            inputs = (x.logits, x.slots, x.positions, x.params)
            plain = x.mode.values.filter_kind == NO_FILTERS  # as the runner says it of a step
            sampled = table.sample(*inputs, scored=x.mode.logprobs, plain=plain)
            if not x.mode.logprobs:
                return sampled.token_ids, sampled.ok
            raw = table.drawn_logprobs(*inputs, sampled, NUM_TOP)
            return (
                *(sampled.token_ids, sampled.ok),
                *(raw.logprobs, raw.ranks, raw.top_ids, raw.top_logprobs),
            )

        return call

    return prepare
