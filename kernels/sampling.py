"""Logits to token ids (8 of 8): the definition of sampling, its parameters and the reference.

R rows are sampled in a step; each belongs to a slot that holds its request's parameters. The
operation, in this order (that of transformers and vLLM):

    1. logits to float32
    2. - inf where banned       an allow-list bans all tokens but its own; then + bias
    3. stop ids banned          while position < min_position (this is `min_tokens`)
    4. repetition penalty r     l > 0 ? l / r : l * r, for every token of the prompt or the output
    5. - frequency * count - presence * [count > 0], over the output alone
    6. argmax if greedy         (temperature below GREEDY_BELOW); otherwise
    7. * (1 / temperature)
    8. filters                  top-n-sigma, top-k, typical-p, top-p, min-p, XTC; see `filters.py`
    9. Gumbel-max draw          argmax(l + g), g the noise of `rng.py`

With `temperature_last` step 7 comes after step 8, as in llama.cpp: filters see temperature 1.

A row's result depends on its own logits, parameters and position alone: not on R, its index or
its neighbours. Logprobs are of the logits before step 2, or of what step 9 draws from
(`drawn_logprobs.py`).

A row is not ok, and its token must not be used, when a NaN is in it or when nothing but -inf is
left after step 5. A ban adds -inf, so a banned +inf is a NaN. Where +inf remains after step 7,
nothing else has a chance: the +inf of the lowest id is taken, unfiltered.

`sample_cpu` and `sample_triton` compute the same; this file imports neither.

Before it: engine/models/decoder.py gives the logits, kernels/attention.py inside it. After it the
tokens go back through engine/core/loop.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.checks import expect
from millrace.kernels.filters import Filters, kept_tokens
from millrace.kernels.rng import gumbel_noise_at, xtc_coins
from millrace.kernels.slot_sampling import SlotSampling, SlotValues
from millrace.kernels.token_mask import members

__all__ = ["SampledTokens", "SlotSampling", "SlotValues", "sample_reference"]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would only overflow."""


@dataclass
class SweepNotes:
    """What `sample_triton` has seen of rows of T tiles: their logprobs need no second sweep.

    y are the logits that a row is scored by: the model's own if its slot asks for raw logprobs,
    else those that are left before the filters, with the temperature. Without `scored`, T is 0.
    """

    kept: Tensor  # i64[R, 4], the survivors of the filters, see `order_triton.survives`
    maxima: Tensor  # f32[R, T * 128], of y in groups of 32 neighbours
    best: Tensor  # f32[R, T], of y in the tile; NaN if it holds one
    mass: Tensor  # i64[R, T], of y in the tile, relative to its best


@dataclass
class SampledTokens:
    """One row per sampled token."""

    token_ids: Tensor  # i64[R]; 0 where not ok
    ok: Tensor  # bool[R]; False: NaN, or no token left; the row's token must not be used
    notes: SweepNotes | None = None  # of `sample_triton`


def sample_reference(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    scored: bool = False,
    plain: bool = False,
) -> SampledTokens:
    """Sample one token a row: logits f32|bf16|f16[R, V], slots i64[R], positions i64[R].

    `positions` are the absolute positions of the tokens being drawn. `scored` announces that
    `drawn_logprobs` will be called for the rows, `plain` that no row has a filter (the caller sees
    to that); here they change nothing. ValueError names what does not fit.
    """
    check_inputs(logits, slots, positions, params)
    token_ids = torch.zeros_like(slots)
    ok = torch.zeros_like(slots, dtype=torch.bool)
    for i_row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        row = edit_row(logits[i_row].to(torch.float32, copy=True), slot, position, params)
        token_id = draw_from_row(row, slot, position, params)
        if token_id is not None:
            token_ids[i_row], ok[i_row] = token_id, True
    return SampledTokens(token_ids, ok)


def edit_row(row: Tensor, slot: int, position: int, params: SlotSampling) -> Tensor:
    """Steps 2 to 5 in place on one row f32[V], which is returned."""
    if params.has_bans[slot]:
        allowed = members(params.allowed[slot], params.vocab)
        row.copy_(torch.where(allowed, row, row - math.inf))
    if params.has_bias[slot]:
        row += params.bias[slot]
    if position < params.min_position[slot]:
        stop_ids = params.stop_ids[slot]
        row[stop_ids[stop_ids >= 0].unique().long()] += -math.inf
    if params.has_penalties[slot]:
        counts = params.output_counts[slot]
        seen = ((counts > 0) | params.prompt_seen[slot]).nonzero().squeeze(1)
        penalty, values = params.repetition_penalty[slot], row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        said = counts.nonzero().squeeze(1)
        row[said] -= params.frequency_penalty[slot] * counts[said] + params.presence_penalty[slot]
    return row


def draw_from_row(row: Tensor, slot: int, position: int, params: SlotSampling) -> int | None:
    """Steps 6 to 9 on one edited row f32[V]; None where the row has no token to give."""
    best = row.max()
    if best.isnan() or best == -math.inf:
        return None
    greedy, before, after = temperature_factors(slot, params)
    scaled = row * before
    if greedy or scaled.max() == math.inf:
        return int(scaled.argmax())
    kept = kept_tokens(scaled, filters_of(slot, position, params))
    kept = kept.sort().values  # so that the first of equal scores has the lowest id
    seeds, positions = params.seed[slot].view(1), params.seed.new_tensor([position])
    noise = gumbel_noise_at(seeds, positions, kept.unsqueeze(0))[0]
    return int(kept[(scaled[kept] * after + noise).argmax()])


def temperature_factors(slot: int, params: SlotSampling) -> tuple[bool, Tensor, Tensor]:
    """(whether greedy, the factor before the filters, the factor after them); one of them is 1."""
    temperature = params.temperature[slot]
    one = torch.ones_like(temperature)
    if temperature < GREEDY_BELOW:
        return True, one, one
    inverse = 1.0 / temperature
    return (False, one, inverse) if params.temperature_last[slot] else (False, inverse, one)


def filters_of(slot: int, position: int, params: SlotSampling) -> Filters:
    """A row's filters; XTC among them only if its coin falls so."""
    probability, xtc = float(params.xtc_probability[slot]), False
    if probability > 0.0:
        at = params.seed.new_tensor([position])
        xtc = float(xtc_coins(params.seed[slot].view(1), at)[0]) < probability
    return Filters(
        top_n_sigma=float(params.top_n_sigma[slot]),
        top_k=int(params.top_k[slot]),
        typical_p=float(params.typical_p[slot]),
        top_p=float(params.top_p[slot]),
        min_p=float(params.min_p[slot]),
        xtc_threshold=float(params.xtc_threshold[slot]) if xtc else None,
    )


def check_inputs(logits: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling) -> None:
    """ValueError naming the tensor whose shape, dtype or device does not fit.

    The range of `slots` is not looked at: on a GPU that would wait for the device.
    """
    rows = logits.shape[0]
    expect("logits", logits, (None, params.vocab))
    expect("slots", slots, (rows,), torch.int64)
    expect("positions", positions, (rows,), torch.int64)
    devices = {str(t.device) for t in (logits, slots, positions)} | {str(params.device)}
    if len(devices) != 1:
        raise ValueError(f"logits, slots, positions and params: one device, got {sorted(devices)}")
