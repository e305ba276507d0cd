"""SamplingParams: what one request asks of the sampler, with vLLM's names and meanings.

A msgspec struct, because it crosses the process boundary as it is. `validate` is the only place
that knows the ranges; `kernels/sampling.py` has the formulas and the order in which they apply.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from millrace.engine.errors import InvalidRequest

MAX_N = 64  # samples of one prompt
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64  # these and the model's own share the device's table of stop ids
MAX_EOS_IDS = 16
MAX_LOGPROBS = 20  # as in OpenAI's API
MAX_LOGIT_BIAS = 1024  # entries in logit_bias
MAX_SEED = 2**63 - 1

LogprobsMode = Literal["raw", "processed"]


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How the tokens of one request are chosen and when it ends.

    Defaults follow vLLM; `max_tokens=None` means "up to the model's context".
    """

    n: int = 1  # independent samples of one prompt, 1..MAX_N; they share the prompt's KV
    temperature: float = 1.0  # >= 0; 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 or -1 keeps all
    top_p: float = 1.0  # (0, 1]; keep the shortest head that holds this probability mass
    min_p: float = 0.0  # [0, 1]; keep tokens at least this times as likely as the likeliest
    typical_p: float = 1.0  # (0, 1]; keep tokens near the expected surprise that hold this mass
    top_n_sigma: float = 0.0  # >= 0; keep logits this many deviations below the best; 0 keeps all
    xtc_probability: float = 0.0  # [0, 1]; how often tokens from xtc_threshold on are left out,
    xtc_threshold: float = 0.1  # [0, 1]; but for the least likely of them
    temperature_last: bool = False  # the filters look at temperature 1, as in llama.cpp
    repetition_penalty: float = 1.0  # > 0; over prompt and output; 1 is off
    presence_penalty: float = 0.0  # [-2, 2]; over the output
    frequency_penalty: float = 0.0  # [-2, 2]; over the output, times the count
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit, [-100, 100]
    allowed_token_ids: list[int] | None = None  # only these may be drawn
    banned_token_ids: list[int] | None = None  # these may not
    min_tokens: int = 0  # no end-of-sequence or stop token before this many output tokens
    max_tokens: int | None = 16  # output tokens; None: until the context is full
    seed: int | None = None  # [0, 2**63); None draws one. Sample i of n uses seed + i
    stop: list[str] = []  # the output ends before the first of these
    stop_token_ids: list[int] = []  # the output ends at any of these
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # go on past the model's end-of-sequence token
    logprobs: int | None = None  # log-probabilities of chosen tokens and of this many likeliest
    logprobs_mode: LogprobsMode = "raw"  # before any edit, or of what the token was drawn from
    prompt_logprobs: int | None = None  # raw ones for each token of the prompt
    skip_special_tokens: bool = True  # leave control tokens out of the text


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest, naming the field and its limit, unless `params` can be served."""
    _check_range("n", params.n, 1, MAX_N)
    _check_range("temperature", params.temperature, 0.0, math.inf)
    _check_range("top_k", params.top_k, -1, 2**31 - 1)
    _check_range("top_p", params.top_p, 0.0, 1.0, low_open=True)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("typical_p", params.typical_p, 0.0, 1.0, low_open=True)
    _check_range("top_n_sigma", params.top_n_sigma, 0.0, math.inf)
    _check_range("xtc_probability", params.xtc_probability, 0.0, 1.0)
    _check_range("xtc_threshold", params.xtc_threshold, 0.0, 1.0)
    _check_range("repetition_penalty", params.repetition_penalty, 0.0, math.inf, low_open=True)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_range("max_tokens", params.max_tokens, 1, 2**31 - 1)
    _check_range("min_tokens", params.min_tokens, 0, params.max_tokens or 2**31 - 1)
    _check_range("seed", params.seed, 0, MAX_SEED)
    _check_range("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _check_range("prompt_logprobs", params.prompt_logprobs, 0, MAX_LOGPROBS)
    _check_stops(params)
    _check_token_ids(params, vocab_size)


def _check_range(
    field: str, value: float | None, low: float, high: float, low_open: bool = False
) -> None:
    if value is None:
        return
    limit = f"{'(' if low_open else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
    if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
        raise InvalidRequest(f"{field} must be in {limit}, got {value}", field, limit)


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOP_STRINGS:
        _refuse("stop", f"at most {MAX_STOP_STRINGS} strings", f"{len(params.stop)} strings")
    for text in params.stop:
        if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
            _refuse("stop", f"1 to {MAX_STOP_STRING_CHARS} characters", f"{len(text)} characters")
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        count = len(params.stop_token_ids)
        _refuse("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids", f"{count} ids")


def _check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    bias = params.logit_bias or {}
    if len(bias) > MAX_LOGIT_BIAS:
        _refuse("logit_bias", f"at most {MAX_LOGIT_BIAS} entries", f"{len(bias)} entries")
    for value in bias.values():
        _check_range("logit_bias", value, -100.0, 100.0)
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        _refuse("allowed_token_ids", "at least one id", "an empty list")
    id_lists = {
        "logit_bias": bias,
        "allowed_token_ids": params.allowed_token_ids or (),
        "banned_token_ids": params.banned_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
    }
    for field, ids in id_lists.items():
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                _refuse(field, f"token ids in [0, {vocab_size})", f"id {token_id}")
    banned = set(params.banned_token_ids or ())
    allowed = params.allowed_token_ids or range(vocab_size)
    if all(token_id in banned for token_id in allowed):  # ends at the first that isn't
        _refuse("banned_token_ids", "leave at least one allowed token", "every token is banned")


def _refuse(field: str, limit: str, got: str) -> None:
    raise InvalidRequest(f"{field}: {limit}; got {got}", field, limit)
