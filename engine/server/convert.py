"""Between the public proto and the engine's types: requests in, results out.

Every field of every request is used here or refused by name (a test walks the descriptors). What
can be judged from the message alone is judged here; ranges of sampling parameters belong to
engine/sampling_params.py, and what depends on the model to engine/input.py.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import NoReturn

from millrace.engine.config import MAX_REQUEST_ID_BYTES
from millrace.engine.core.messages import FinishReason, Ready, StepStats, TokenLogprobs
from millrace.engine.errors import InvalidRequest
from millrace.engine.input import ChatPrompt, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from millrace.engine.outbox import RequestOutput
from millrace.engine.output import OutputDelta, Summary
from millrace.engine.sampling_params import MAX_LOGPROBS, LogprobsMode, SamplingParams
from millrace.engine.server.caller import Caller
from millrace.engine.server.status import MS, failure_of
from millrace.engine.text.chat import Message
from millrace.v1 import admin_pb2 as admin
from millrace.v1 import inference_pb2 as pb

MAX_TIMEOUT_MS = 2**53  # exact as a float; more than anybody waits

_SAMPLING_FIELDS = (  # optional, and named alike on both sides
    *("temperature", "temperature_last", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p"),
    *("xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "n"),
)
_LOGPROBS_MODES: dict[int, LogprobsMode] = {
    pb.LOGPROBS_MODE_UNSPECIFIED: "raw",
    pb.LOGPROBS_MODE_RAW: "raw",
    pb.LOGPROBS_MODE_PROCESSED: "processed",
}
_FINISH: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "deadline": pb.FINISH_REASON_DEADLINE,
    "refused": pb.FINISH_REASON_REFUSED,
    "error": pb.FINISH_REASON_ERROR,
}

# ---------------------------------------------------------------- requests


def generation_request(
    proto: pb.GenerateRequest, request_id: str, caller: Caller
) -> GenerationRequest:
    """Return the request that `proto` asks for on a call of `caller`.

    Of the request's deadline and the call's own, the nearer counts. Raises InvalidRequest.
    """
    timeouts_s = [] if caller.timeout_s is None else [caller.timeout_s]
    if proto.HasField("timeout_ms"):
        timeouts_s.append(_timeout_s(proto.timeout_ms))
    return GenerationRequest(
        request_id=request_id,
        prompt=to_prompt(proto.prompt),
        params=to_params(proto.sampling, proto.stopping, proto.response),
        timeout_s=min(timeouts_s, default=None),
        priority=proto.priority,
        tenant=caller.tenant_of(proto.tenant),
    )


def score_request(proto: pb.ScoreRequest, request_id: str, caller: Caller) -> GenerationRequest:
    """Return the request whose prompt's log-probabilities answer `proto`.

    The engine knows no request without output: one greedy token is computed, and not reported.
    """
    if not 0 <= proto.top_logprobs <= MAX_LOGPROBS:
        _refuse("top_logprobs", f"in [0, {MAX_LOGPROBS}]", str(proto.top_logprobs))
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=proto.top_logprobs)
    return GenerationRequest(
        request_id=request_id,
        prompt=to_prompt(proto.prompt),
        params=params,
        timeout_s=caller.timeout_s,
        priority=proto.priority,
        tenant=caller.tenant_of(proto.tenant),
    )


def drain_timeout_s(proto: admin.DrainRequest, default_s: float) -> float:
    """Return how long to wait for live requests, in seconds. Raises InvalidRequest."""
    return _timeout_s(proto.timeout_ms) if proto.HasField("timeout_ms") else default_s


def checked_request_id(request_id: str) -> str:
    """Return the id as it is; raises InvalidRequest if it is too long or absent."""
    size = len(request_id.encode())
    if not 0 < size <= MAX_REQUEST_ID_BYTES:
        _refuse("request_id", f"1 to {MAX_REQUEST_ID_BYTES} bytes", f"{size} bytes")
    return request_id


def given_or_new_id(request_id: str) -> str:
    """Return the caller's id, or a new one where none was given."""
    return checked_request_id(request_id or uuid.uuid4().hex)


def to_prompt(proto: pb.Prompt, add_special: bool = True) -> Prompt:
    """Return the prompt; `add_special` is only for text. Raises InvalidRequest."""
    match proto.WhichOneof("input"):
        case "text":
            return TextPrompt(proto.text, add_special)
        case "token_ids":
            return TokenPrompt(list(proto.token_ids.ids))
        case "messages":
            return _chat_prompt(proto.messages)
    _refuse("prompt", "text, token_ids or messages", "none of them")


def _chat_prompt(proto: pb.ChatMessages) -> ChatPrompt:
    messages = [Message(message.role, message.content) for message in proto.messages]
    add_header = not proto.HasField("add_generation_prompt") or proto.add_generation_prompt
    return ChatPrompt(messages, add_header)


def to_params(
    sampling: pb.SamplingParams, stopping: pb.Stopping, response: pb.ResponseOptions
) -> SamplingParams:
    """Return the sampling parameters; what is unset takes its documented default."""
    values = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS if sampling.HasField(name)}
    if values.get("top_k", 0) < 0:
        _refuse("top_k", "at least 0; 0 keeps all tokens", str(sampling.top_k))
    if response.logprobs_mode not in _LOGPROBS_MODES:
        _refuse("logprobs_mode", "RAW or PROCESSED", str(response.logprobs_mode))
    return SamplingParams(
        **values,
        logit_bias=dict(sampling.logit_bias) or None,
        allowed_token_ids=list(sampling.allowed_token_ids) or None,
        banned_token_ids=list(sampling.banned_token_ids) or None,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens,
        stop=list(stopping.stop),
        stop_token_ids=list(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop_str_in_output=stopping.include_stop_string,
        logprobs=response.logprobs if response.HasField("logprobs") else None,
        logprobs_mode=_LOGPROBS_MODES[response.logprobs_mode],
        prompt_logprobs=response.prompt_logprobs if response.HasField("prompt_logprobs") else None,
        skip_special_tokens=skips_special(response),
    )


def skips_special(proto: pb.ResponseOptions | pb.DetokenizeRequest) -> bool:
    """Return `skip_special_tokens`, which is true by default."""
    return proto.skip_special_tokens if proto.HasField("skip_special_tokens") else True


def _timeout_s(timeout_ms: int) -> float:
    if not 0 < timeout_ms <= MAX_TIMEOUT_MS:
        _refuse("timeout_ms", f"in [1, {MAX_TIMEOUT_MS}]", str(timeout_ms))
    return timeout_ms / MS


def _refuse(field: str, limit: str, got: str) -> NoReturn:
    raise InvalidRequest(f"{field} must be {limit}, got {got}", field, limit)


# ---------------------------------------------------------------- results


def generate_response(output: RequestOutput) -> pb.GenerateResponse:
    """Return what is new of one request; `output.error` is the caller's business."""
    response = pb.GenerateResponse(
        request_id=output.request_id,
        outputs=[_output_delta(delta) for delta in output.outputs],
        prompt_logprobs=token_logprobs(output.prompt_logprobs),
    )
    if output.summary is not None:
        response.summary.CopyFrom(_summary(output.summary))
    return response


def connect_result(output: RequestOutput) -> pb.ConnectResult:
    """Return what is new of one request of a Connect stream, with its failure if it has one."""
    result = pb.ConnectResult(response=generate_response(output))
    if output.error is not None:
        result.failure.CopyFrom(failure_of(output.error))
    return result


def score_response(tokens: list[TokenLogprobs], prompt_tokens: int) -> pb.ScoreResponse:
    """Return the answer to a ScoreRequest."""
    return pb.ScoreResponse(
        tokens=token_logprobs(tokens),
        total_logprob=math.fsum(token.logprob for token in tokens),
        prompt_tokens=prompt_tokens,
    )


def model_response(
    model: Ready, eos_token_ids: list[int], has_chat_template: bool, version: str
) -> pb.GetModelResponse:
    """Return what a client may know of the model."""
    return pb.GetModelResponse(
        name=model.model,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
        device=model.device,
        backend=model.backend,
        kv_block_size=model.block_size,
        kv_blocks=model.num_blocks,
        max_running=model.max_running,
        eos_token_ids=eos_token_ids,
        has_chat_template=has_chat_template,
        version=version,
    )


def load_response(stats: StepStats, model: Ready, draining: bool) -> admin.GetLoadResponse:
    """Return the load as of the newest step."""
    return admin.GetLoadResponse(
        running=stats.running,
        waiting=stats.waiting,
        max_running=model.max_running,
        kv_blocks_total=model.num_blocks,
        kv_blocks_used=stats.blocks_used,
        kv_blocks_cached=stats.blocks_cached,
        draining=draining,
        steps=stats.step,
    )


def token_logprobs(tokens: Sequence[TokenLogprobs] | None) -> list[pb.TokenLogprob]:
    """Return the log-probabilities of each token."""
    return [
        pb.TokenLogprob(
            token_id=token.token_id,
            logprob=token.logprob,
            rank=token.rank,
            top_ids=token.top_ids,
            top_logprobs=token.top_logprobs,
        )
        for token in tokens or ()
    ]


def _output_delta(delta: OutputDelta) -> pb.OutputDelta:
    proto = pb.OutputDelta(index=delta.index, text=delta.text, token_ids=delta.token_ids)
    if delta.logprobs:
        proto.logprobs.extend(token_logprobs(delta.logprobs))
    if delta.finish is not None:
        proto.finish_reason = _FINISH[delta.finish]
        if delta.stop_string is not None:
            proto.stop_string = delta.stop_string
        elif delta.stop_token_id is not None:
            proto.stop_token_id = delta.stop_token_id
    return proto


def _summary(summary: Summary) -> pb.Summary:
    return pb.Summary(
        usage=pb.Usage(
            prompt_tokens=summary.prompt_tokens,
            cached_tokens=summary.cached_tokens,
            output_tokens=summary.output_tokens,
        ),
        timing=pb.Timing(
            queue_ms=summary.queue_s * MS,
            first_token_ms=summary.first_token_s * MS,
            total_ms=summary.total_s * MS,
        ),
        seed=summary.seed,
    )
