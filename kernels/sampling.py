"""Logits to token ids (8 of 8): the definition of sampling, its parameters and the reference.

R rows are sampled in a step; each belongs to a slot that holds its request's parameters. The
operation, in this order (that of transformers and vLLM):

    1. logits to float32
    2. + bias                   logit bias; -inf bans a token; an allow-list bans all the others
    3. stop ids banned          while position < min_position (this is `min_tokens`)
    4. repetition penalty r     l > 0 ? l / r : l * r, for every token of the prompt or the output
    5. - frequency * count - presence * [count > 0], over the output alone
    6. argmax if greedy         (temperature below GREEDY_BELOW); otherwise
    7. * (1 / temperature)
    8. top-k                    the k best tokens
    9. top-p                    the shortest head that holds the mass p of those left by top-k
   10. min-p                    tokens at least min_p times as probable as the best
   11. Gumbel-max draw          argmax(l + g), g the noise of `rng.py`

Ties. Tokens are ordered by (value descending, id ascending), and cuts obey that order: exactly k
are kept, where transformers keeps every token that ties with the k-th. Apart from ties, top-k,
top-p (the token that crosses p stays) and min-p keep the sets that transformers keeps.

Sums. A token's mass is the integer floor(exp(l - max) * 2^40). Sums of integers do not depend on
their order, so neither the batch nor the launch can move a cut; what truncation loses is below
V * 2^-40 of the best token's mass.

A row's result depends on its own logits, parameters and position alone: not on R, its index or
its neighbours. Logprobs are raw, of the logits before step 2 (see `logprobs.py`).

A row is not ok, and its token must not be used, when a NaN is in it or when nothing but -inf is
left after step 5. A ban adds -inf, so a banned +inf is a NaN. Where +inf remains after step 7,
nothing else has a chance: the +inf of the lowest id is taken.

`sample_cpu` and `sample_triton` compute the same; this file imports neither.

Before it: engine/models/decoder.py gives the logits, kernels/attention.py inside it. After it the
tokens go back through engine/core/loop.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.checks import expect
from millrace.kernels.logprobs import MASS_ONE
from millrace.kernels.rng import gumbel_noise_at
from millrace.kernels.slot_sampling import SlotSampling, SlotValues

__all__ = ["SampledTokens", "SlotSampling", "SlotValues", "sample_reference"]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would only overflow."""


@dataclass
class SampledTokens:
    """One row per sampled token."""

    token_ids: Tensor  # i64[R]; 0 where not ok
    ok: Tensor  # bool[R]; False: NaN, or no token left; the row's token must not be used


def sample_reference(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
) -> SampledTokens:
    """Sample one token a row: logits f32|bf16|f16[R, V], slots i64[R], positions i64[R].

    `positions` are the absolute positions of the tokens being drawn. ValueError names what does
    not fit.
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
    """Steps 6 to 11 on one edited row f32[V]; None where the row has no token to give."""
    best = row.max()
    if best.isnan() or best == -math.inf:
        return None
    temperature = params.temperature[slot]
    scaled = row if temperature < GREEDY_BELOW else row * (1.0 / temperature)
    if temperature < GREEDY_BELOW or scaled.max() == math.inf:
        return int(scaled.argmax())
    kept = kept_tokens(
        scaled, int(params.top_k[slot]), float(params.top_p[slot]), params.min_p[slot]
    )
    kept = kept.sort().values  # so that the first of equal scores has the lowest id
    seeds, positions = params.seed[slot].view(1), params.seed.new_tensor([position])
    scores = scaled[kept] + gumbel_noise_at(seeds, positions, kept.unsqueeze(0))[0]
    return int(kept[scores.argmax()])


def kept_tokens(scaled: Tensor, top_k: int, top_p: float, min_p: Tensor) -> Tensor:
    """Ids that survive steps 8 to 10, best first: scaled f32[V], min_p f32[] -> i64[kept]."""
    values, ids = scaled.sort(descending=True, stable=True)
    kept = int((values > -math.inf).sum())
    if top_k > 0:
        kept = min(kept, top_k)
    if top_p < 1.0:
        masses = fixed_point_mass(values[:kept], values[0])
        before = masses.cumsum(0) - masses
        kept = int((before < top_p_target(top_p, int(masses.sum()))).sum())
    if min_p > 0.0:
        kept = min(kept, int((values >= values[0] + min_p.log()).sum()))
    return ids[:kept]


def fixed_point_mass(values: Tensor, best: Tensor) -> Tensor:
    """Masses relative to the best token's: f32, f32 -> i64, floor(exp(values - best) * 2^40)."""
    return ((values - best).exp_() * MASS_ONE).to(torch.int64)


def top_p_target(top_p: float, total: int) -> int:
    """The mass that top-p must reach: ceil(p * total) in float64, at least 1."""
    return max(1, min(total, math.ceil(top_p * float(total))))


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
