"""Other ways to sample: a sort in torch's operations, and FlashInfer's rejection kernels.

Neither takes bans; they get a copy of the logits with -inf for what is banned, in one operation.

They draw with other noise, so their tokens are not those of the reference; the check is that each
lies in the set that the reference keeps. Both give logprobs from a log_softmax over the row, where
a case asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.token_mask import members
from millrace.perf.kernels.case import Absent, Call, Outputs, Provider
from millrace.perf.kernels.logits import SamplingInputs
from millrace.perf.kernels.providers import ON_CPU

NUM_TOP = 5
EDGE = 1e-3


def torch_sort() -> Provider:
    """What an engine without kernels does: sort, cut, softmax, and the exponential race."""
    return Provider(_torch_sort, check=_tokens_are_kept)


def _torch_sort(x: SamplingInputs) -> Call:
    values, allowed_logits = x.mode.values, _without_bans(x)

    def draw() -> Tensor:
        logits = allowed_logits()
        if values.top_k == 0 and values.top_p == 1.0:
            return _race(logits.softmax(-1))
        ordered, ids = logits.sort(dim=-1, descending=True)
        if values.top_k:
            ordered[:, values.top_k :] = -torch.inf
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities.masked_fill_(before >= values.top_p, 0.0)
        return ids.gather(1, _race(probabilities).unsqueeze(1)).squeeze(1)

    return lambda: _with_logprobs(x, draw())


def _race(probabilities: Tensor) -> Tensor:
    """argmax(p / e), e exponential: one draw a row from p without a sum or a host wait."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def flashinfer(device: torch.device) -> Provider | Absent:
    """FlashInfer's samplers, top-k first as here."""
    if device.type != "cuda":
        return ON_CPU
    if find_spec("flashinfer") is None:
        return Absent("flashinfer is not installed")
    return Provider(_flashinfer, check=_tokens_are_kept)


def _flashinfer(x: SamplingInputs) -> Call:
    library: Any = import_module("flashinfer.sampling")
    values, allowed_logits = x.mode.values, _without_bans(x)

    def draw() -> Any:
        logits = allowed_logits()
        if values.top_k:
            return library.top_k_top_p_sampling_from_logits(
                logits, values.top_k, values.top_p, filter_apply_order="top_k_first"
            )
        if values.top_p < 1.0:
            return library.top_p_sampling_from_probs(logits.softmax(-1), values.top_p)
        return library.sampling_from_logits(logits)

    return lambda: _with_logprobs(x, draw())


def _without_bans(x: SamplingInputs) -> Callable[[], Tensor]:
    """The logits of what may be drawn; every slot bans the same tokens."""
    if not x.mode.values.has_bans:
        return lambda: x.logits
    banned = ~members(x.params.allowed[0], x.params.vocab)
    return lambda: x.logits.masked_fill(banned, -torch.inf)


def _with_logprobs(x: SamplingInputs, token_ids: Tensor) -> Outputs:
    if not x.mode.logprobs:
        return (token_ids,)
    logprobs = x.logits.log_softmax(-1)
    chosen = logprobs.gather(1, token_ids.long().unsqueeze(1))
    return token_ids, chosen, (logprobs > chosen).sum(-1), *logprobs.topk(NUM_TOP)


def _tokens_are_kept(x: SamplingInputs, got: Outputs, wanted: Outputs) -> str:
    """By a sort in float64; at the edge of top-p a peer's float32 sum may fall either way."""
    values = x.mode.values
    ordered, ids = _without_bans(x)().double().sort(dim=-1, descending=True)
    if values.top_k:
        ordered[:, values.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = (probabilities > 0) & (before < values.top_p + EDGE)
    drawn = ids == got[0].unsqueeze(1)
    outside = (~(kept & drawn).any(dim=-1)).nonzero().squeeze(1).tolist()
    return f"rows {outside}: their tokens are not among those kept" if outside else ""
