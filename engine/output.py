"""SequenceOutput and RequestProgress: the core's deltas become text, finish reasons and timings.

Knows neither sockets nor asyncio, so the server (`async_engine.py`) and the offline API (`llm.py`)
share it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from millrace.engine.core.messages import Delta, FinishReason, TokenLogprobs
from millrace.engine.errors import (
    DuplicateRequest,
    EngineUnavailable,
    InvalidRequest,
    MillraceError,
    Overloaded,
    RequestError,
    StepFailed,
)
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.text.detokenizer import IncrementalDetokenizer
from millrace.engine.text.stop import StopMatcher
from millrace.engine.text.tokenizer import Tokenizer

# Of several outputs, the first of these that one of them has is the request's outcome.
WORST_FIRST: tuple[FinishReason, ...] = (
    "error",
    "refused",
    "deadline",
    "cancelled",
    "length",
    "stop",
)


@dataclass(slots=True)
class OutputDelta:
    """What is new in one of a request's n outputs."""

    index: int
    text: str = ""  # never half a character, nor what may still become a stop string
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one per token, where asked for
    finish: FinishReason | None = None  # set in the output's last delta
    stop_token_id: int | None = None  # with "stop": the token that ended the output, or ...
    stop_string: str | None = None  # ... the string that did

    @property
    def empty(self) -> bool:
        """It says nothing."""
        return not (self.token_ids or self.text or self.finish)

    def merge(self, later: OutputDelta) -> None:
        """Append the next delta of the same output."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is None:
            self.logprobs = later.logprobs
        elif later.logprobs is not None:
            self.logprobs += later.logprobs
        self.finish = later.finish
        self.stop_token_id = later.stop_token_id
        self.stop_string = later.stop_string


@dataclass(frozen=True, slots=True)
class Summary:
    """How a request went, over all its outputs. Seconds from its arrival; 0 where never reached."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV was reused
    output_tokens: int
    queue_s: float  # until first given to the device
    first_token_s: float
    total_s: float
    seed: int  # with the same request, gives the same tokens again


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has ended in whatever way, for the metrics. None: it never came so far."""

    outcome: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_s: float | None = None  # arrival to first given to the device
    prefill_s: float | None = None  # from there to the first token
    first_token_s: float | None = None  # arrival to the first token
    total_s: float = 0.0
    itl_s: Sequence[float] = ()  # between two deltas with tokens of one output
    priority: int = 0
    tenant: str = ""
    refusal: str = ""  # with "refused": why, as `refusal` says


class SequenceOutput:
    """The text of one sequence: detokenizing and stop strings."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish: FinishReason | None = None
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._matcher = (
            StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        )

    def apply(self, delta: Delta) -> OutputDelta:
        """Take in the core's next delta; returns what may be told of it.

        The token that ended the output is among `token_ids`, but not in the text (unless
        `include_stop_str_in_output`). A stop string ends the output at the token that completes it,
        wherever deltas were cut; `finish` is set then although `delta.finish` is not, and the owner
        must cancel the sequence in the core. Once finished, further deltas give empty ones.
        """
        if self.finish is not None:
            return OutputDelta(self.index)
        output = OutputDelta(self.index, token_ids=delta.token_ids, logprobs=delta.logprobs)
        spoken = delta.token_ids
        if delta.stop_token_id is not None and not self._params.include_stop_str_in_output:
            spoken = spoken[:-1]
        if self._matcher is None:
            output.text = self._detokenizer.push(spoken)
        else:
            self._match(self._matcher, spoken, output)
        if delta.finish is not None and output.stop_string is None:
            self._flush(delta, output)
        self.num_tokens += len(output.token_ids)
        self.finish = output.finish
        return output

    def _match(self, matcher: StopMatcher, ids: list[int], output: OutputDelta) -> None:
        """Push token by token, so that a match cuts the tokens exactly where it is complete."""
        for count, token_id in enumerate(ids, start=1):
            text = self._detokenizer.push((token_id,))
            if self.num_tokens + count <= self._params.min_tokens:
                output.text += text  # too early to stop, as for stop tokens
                continue
            released, matched = matcher.push(text)
            output.text += released
            if matched is not None:
                output.finish, output.stop_string = "stop", matched
                output.token_ids = output.token_ids[:count]
                output.logprobs = output.logprobs[:count] if output.logprobs else output.logprobs
                return

    def _flush(self, delta: Delta, output: OutputDelta) -> None:
        """The sequence has ended in the core: release all that was held back."""
        output.finish, output.stop_token_id = delta.finish, delta.stop_token_id
        rest = self._detokenizer.finish()  # half a character, as U+FFFD
        if self._matcher is None:
            output.text += rest
            return
        released, matched = self._matcher.push(rest)
        output.text += released
        if matched is not None:
            output.finish, output.stop_token_id, output.stop_string = "stop", None, matched
        else:
            output.text += self._matcher.finish()


class RequestProgress:
    """All outputs of one request, their counts and times. Times are of the monotonic clock.

    `priority` and `tenant` are for the metrics alone.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        arrival_s: float,
        priority: int = 0,
        tenant: str = "",
    ) -> None:
        self._priority, self._tenant = priority, tenant
        self.sequences = [SequenceOutput(i, params, tokenizer) for i in range(params.n)]
        self.arrival_s = arrival_s
        self.prompt_tokens = 0  # set when they are known
        self.seed = 0  # likewise
        self._unfinished = params.n
        self._cached_tokens = 0
        self._scheduled_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s = [0.0] * params.n
        self._gaps_s = array("d")

    @property
    def finished(self) -> bool:
        """All outputs have ended."""
        return self._unfinished == 0

    def apply(self, index: int, delta: Delta, now_s: float) -> OutputDelta:
        """Take in a delta of output `index`, received at `now_s`."""
        sequence = self.sequences[index]
        if sequence.finish is None:
            self._time(index, delta, now_s)
        output = sequence.apply(delta)
        if output.finish is not None:
            self._unfinished -= 1
        return output

    def end(self, reason: FinishReason) -> list[OutputDelta]:
        """End the outputs that have not: their last deltas."""
        now_s = self.arrival_s  # no token is among them, so no time is taken
        ended = [s.index for s in self.sequences if s.finish is None]
        return [self.apply(i, Delta(id=i, token_ids=[], finish=reason), now_s) for i in ended]

    def summary(self, now_s: float) -> Summary:
        return Summary(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            queue_s=self._since_arrival(self._scheduled_s) or 0.0,
            first_token_s=self._since_arrival(self._first_token_s) or 0.0,
            total_s=now_s - self.arrival_s,
            seed=self.seed,
        )

    def finished_request(
        self, now_s: float, outcome: FinishReason | None = None, refusal: str = ""
    ) -> FinishedRequest:
        """For the metrics; without an `outcome`, the worst of the outputs' finish reasons."""
        prefill_s = None
        if self._scheduled_s is not None and self._first_token_s is not None:
            prefill_s = self._first_token_s - self._scheduled_s
        return FinishedRequest(
            outcome=outcome or self._worst_finish(),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            queue_s=self._since_arrival(self._scheduled_s),
            prefill_s=prefill_s,
            first_token_s=self._since_arrival(self._first_token_s),
            total_s=now_s - self.arrival_s,
            itl_s=self._gaps_s,
            priority=self._priority,
            tenant=self._tenant,
            refusal=refusal,
        )

    def _worst_finish(self) -> FinishReason:
        finishes = {sequence.finish for sequence in self.sequences}
        return next(reason for reason in WORST_FIRST if reason in finishes)

    @property
    def _output_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    def _since_arrival(self, time_s: float | None) -> float | None:
        return None if time_s is None else time_s - self.arrival_s

    def _time(self, index: int, delta: Delta, now_s: float) -> None:
        if self._scheduled_s is None and delta.scheduled_s > 0.0:
            self._scheduled_s = delta.scheduled_s
        if index == 0:  # the siblings share what the first computed: that's no hit
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        if not delta.token_ids:
            return
        if self._first_token_s is None:
            self._first_token_s = now_s
        if self._last_token_s[index]:
            self._gaps_s.append(now_s - self._last_token_s[index])
        self._last_token_s[index] = now_s


def refusal(error: BaseException | None) -> str:
    """Why a request was refused, in a word of a fixed set, for the metrics; "" if it was not.

    Of an overload, the limit that was reached: "max_waiting", for one.
    """
    match error:
        case Overloaded():
            return error.field
        case DuplicateRequest():
            return "duplicate"
        case RequestError():
            return "invalid"
        case EngineUnavailable():
            return "unavailable"
    return ""


def failure(delta: Delta) -> MillraceError | None:
    """The error that a core's last delta stands for; None for a normal end, or none yet."""
    if delta.finish == "error":
        return StepFailed(delta.error)
    if delta.finish != "refused":
        return None
    if delta.retry_after_s > 0.0:
        return Overloaded(delta.error, delta.field, delta.limit, delta.retry_after_s)
    return InvalidRequest(delta.error, delta.field, delta.limit)
