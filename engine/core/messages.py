"""Every struct that crosses the boundary between the front end and the engine core.

A leaf: it knows neither sockets nor the scheduler. Times are seconds of the machine's monotonic
clock, which all its processes share. Token ids travel as little-endian int32 bytes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from millrace.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "deadline", "refused", "error"]


# ---------------------------------------------------------------- front end -> core


class NewRequest(msgspec.Struct, tag="new", frozen=True):
    """One sequence to generate. The n samples of one prompt are n of these."""

    id: int  # unique for the life of the engine
    prompt: bytes  # int32 token ids, at least one
    params: SamplingParams  # `seed` is set; `n` and `stop` are the front end's business
    max_tokens: int  # >= 1; prompt + max_tokens fits the model's context
    stop_token_ids: list[int]  # end-of-sequence ids (unless ignored) and the request's own
    arrival_s: float
    deadline_s: float | None = None  # ended with "deadline" once this has passed
    leader: int | None = None  # id of the sibling whose prompt KV this one waits for and shares
    priority: int = 0  # class; 0 is the most urgent
    tenant: str = ""  # whose it is: tenants share no cached prefixes
    weight: float = 1.0  # of the tenant, > 0: its share compared with others'


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """End these requests; unknown or finished ids are ignored.

    `reason` is "stop" when the front end found a stop string.
    """

    ids: list[int]
    reason: FinishReason = "cancelled"


class FlushCache(msgspec.Struct, tag="flush", frozen=True):
    """Forget every cached prefix that no request is using; answered by CacheFlushed."""

    call: int


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Leave the loop; requests still alive end with "cancelled"."""


ToCore = NewRequest | Cancel | FlushCache | Shutdown


# ---------------------------------------------------------------- core -> front end


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Raw log-probabilities (log_softmax of the unedited logits, natural log) of one position."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top_ids: list[int]
    top_logprobs: list[float]


class Delta(msgspec.Struct, array_like=True):
    """What one step added to one request. `finish` is set in its last delta, exactly once."""

    id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per token, where asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # positions 1.., as their chunk is computed
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, where one did
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    scheduled_s: float = 0.0  # first given to the device; 0: never
    error: str = ""  # for "refused" and "error"
    field: str = ""  # for "refused": what was too large
    limit: str = ""
    retry_after_s: float = 0.0  # for "refused"; 0: never


class StepStats(msgspec.Struct, array_like=True):
    """One turn of the core's loop. Counts without a word are of this step."""

    step: int = 0
    running: int = 0  # requests that own a slot
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0  # referenced by running requests
    blocks_cached: int = 0  # kept for reuse, free to be taken
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0  # prompt tokens looked up
    evicted_blocks: int = 0  # cached ones whose room was needed
    swapped_out_blocks: int = 0  # to the host, of requests that yielded
    swapped_in_blocks: int = 0
    shed: int = 0  # requests whose deadline could no longer be met: ended while they waited
    step_s: float = 0.0  # launching a step, and waiting for the tokens of the oldest
    host_s: float = 0.0  # all else of the turn: scheduling, applying, messages


class StepOutput(msgspec.Struct, tag="step"):
    """All that one step has to say, in one message for all requests."""

    deltas: list[Delta]
    stats: StepStats


class CacheFlushed(msgspec.Struct, tag="flushed", frozen=True):
    """Answer to FlushCache: how many cached blocks were forgotten."""

    call: int
    blocks: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The core has loaded its model and will take requests."""

    model: str
    architecture: str
    vocab_size: int
    max_context: int  # tokens of prompt and output together
    block_size: int  # tokens a block
    num_blocks: int
    max_running: int
    dtype: str
    device: str
    backend: str  # name of the kernels' implementation
    num_parameters: int


class StartFailed(msgspec.Struct, tag="failed", frozen=True):
    """The core could not start; the message is for a person."""

    message: str


FromCore = StepOutput | CacheFlushed | Ready | StartFailed
