"""Rows of logits and sampling parameters for the sampling benchmark.

`real` rows have a head that falls as 1 / rank over a tail of normal noise: k = 50 leaves some
hundred candidates, as a model's rows do. `flat` rows are little noise around nothing, where p alone
keeps tens of thousands of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.slot_sampling import SlotSampling, SlotValues

HEAD, HEAD_LOGIT, FLAT_SCALE = 256, 14.0, 0.05
FIRST_POSITION = 100


@dataclass(frozen=True, slots=True)
class Mode:
    """What the requests of a batch ask for, and of which rows."""

    name: str
    rows: str  # "real" or "flat"
    values: SlotValues
    logprobs: bool
    goal: float


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    logits: Tensor  # f32 [R, V]
    slots: Tensor  # i64 [R]
    positions: Tensor  # i64 [R]
    params: SlotSampling
    mode: Mode


def slot_table(mode: Mode, rows: int, vocab: int, device: torch.device) -> SlotSampling:
    """A slot a row, each with a seed of its own."""
    params = SlotSampling.zeros(rows, vocab, device)
    for slot in range(rows):
        params.write(slot, mode.values)
    params.seed.copy_(torch.arange(rows))
    return params


def sampling_inputs(mode: Mode, params: SlotSampling, seed: int) -> SamplingInputs:
    """A row of fresh logits for each slot of `params`."""
    rows, vocab, device = params.slots, params.vocab, params.device
    random = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(rows, vocab, device=device).normal_(generator=random)
    if mode.rows == "flat":
        logits *= FLAT_SCALE
    else:
        ids = torch.rand(rows, vocab, device=device, generator=random).topk(HEAD).indices
        ranks = torch.arange(1, HEAD + 1, device=device).log()
        logits.scatter_add_(1, ids, (HEAD_LOGIT - ranks).expand(rows, HEAD))
    slots = torch.arange(rows, device=device)
    return SamplingInputs(logits, slots, slots + FIRST_POSITION, params, mode)
