"""A scripted engine core: a real process and real sockets, no model.

Its tokens are a function of the prompt, the position and the seed (`token_at`), so a test knows
every stream beforehand, and chooses it by choosing the prompt. Also ByteTokenizer, whose tokens
are bytes. Run as a program it is the core: `fake_core_command(...)` is its command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from millrace.engine.config import EngineConfig
from millrace.engine.core.ipc import CoreChannel
from millrace.engine.core.messages import (
    CacheFlushed,
    Cancel,
    Delta,
    FlushCache,
    NewRequest,
    Ready,
    Shutdown,
    StartFailed,
    StepOutput,
    StepStats,
    ToCore,
    TokenLogprobs,
)
from millrace.engine.core.process import run_core
from millrace.engine.text.vocabulary import Tokenizer, Vocabulary

BOS, EOS, VOCAB_SIZE = 256, 257, 258
MAX_CONTEXT = 4096
MAX_RUNNING = 64
CACHED_TOKENS = 3  # what every request claims to have reused
FLUSHED_BLOCKS = 7
FAILING_TOKEN = 255  # generating it fails the request, as NaN logits would
REFUSED_TOKEN = 254  # a prompt that begins with it never fits
OVERLOAD_TOKEN = 253  # a prompt that begins with it is refused for now
DEATH_CODE = 9


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes; one beginning-of-sequence token, which starts texts, and one end."""

    def __init__(self) -> None:
        pieces = (*(bytes([i]) for i in range(256)), b"<bos>", b"<eos>")
        super().__init__(Vocabulary(pieces, frozenset({BOS, EOS}), BOS, frozenset({EOS}), False))

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return [BOS] * add_special + list(text.encode())


def fake_core_command(*options: str) -> tuple[str, ...]:
    """The command line of a fake core; see `_options`."""
    return (sys.executable, "-P", __file__, *options)


def token_at(prompt: bytes, position: int, seed: int) -> int:
    """The output echoes the prompt (int32 ids) for ever, from the seed's place in it on."""
    ids = np.frombuffer(prompt, "<i4")
    return int(ids[(position + seed) % len(ids)])


@dataclass
class Running:
    """A sequence and what it has said."""

    request: NewRequest
    position: int = 0
    scheduled_s: float = field(default_factory=time.monotonic)


class FakeCore:
    """Slots, a queue, and one token a step for every running sequence."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.waiting: list[NewRequest] = []
        self.running: dict[int, Running] = {}
        self.stats = StepStats()
        self.deltas: list[Delta] = []
        self.cancels: list[Cancel] = []

    def take(self, message: ToCore, channel: CoreChannel) -> None:
        match message:
            case NewRequest():
                self._submit(message)
            case Cancel(ids=ids, reason=reason):
                live = [i for i in ids if i in self.running or i in {r.id for r in self.waiting}]
                for sequence_id in live:
                    self._end(Delta(sequence_id, [], finish=reason))
            case FlushCache(call=call):
                channel.send(CacheFlushed(call, FLUSHED_BLOCKS))

    def _submit(self, request: NewRequest) -> None:
        first = token_at(request.prompt, 0, 0)
        if first == REFUSED_TOKEN:
            error = {"error": "too long", "field": "prompt", "limit": "at most 10 blocks"}
            self.deltas.append(Delta(request.id, [], finish="refused", **error))
        elif first == OVERLOAD_TOKEN:
            error = {"error": "queue full", "limit": "at most 1", "retry_after_s": 2.5}
            self.deltas.append(Delta(request.id, [], finish="refused", **error))
        else:
            self.waiting.append(request)

    def _end(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.running.pop(delta.id, None)
        self.waiting = [request for request in self.waiting if request.id != delta.id]

    def step(self) -> StepOutput:
        now_s = time.monotonic()
        for request in [*self.waiting, *(r.request for r in self.running.values())]:
            if request.deadline_s is not None and request.deadline_s <= now_s:
                self._end(Delta(request.id, [], finish="deadline"))
        while self.waiting and len(self.running) < self.options.slots:
            request = self.waiting.pop(0)
            self.running[request.id] = Running(request)
        for sequence in list(self.running.values()):
            self._advance(sequence)
        step = self.stats.step + 1
        self.stats = StepStats(step=step, running=len(self.running), waiting=len(self.waiting))
        output, self.deltas = StepOutput(self.deltas, self.stats), []
        return output

    def _advance(self, sequence: Running) -> None:
        request, params = sequence.request, sequence.request.params
        token = token_at(request.prompt, sequence.position, params.seed or 0)
        delta = Delta(request.id, [token], cached_tokens=CACHED_TOKENS)
        delta.scheduled_s = sequence.scheduled_s
        if params.logprobs is not None:
            delta.logprobs = [TokenLogprobs(token, -0.5, 1, [], [])]
        if params.prompt_logprobs is not None and sequence.position == 0:
            ids = np.frombuffer(request.prompt, "<i4")[1:].tolist()
            delta.prompt_logprobs = [TokenLogprobs(i, -1.0, 1, [], []) for i in ids]
        sequence.position += 1
        if token == FAILING_TOKEN:
            self._end(Delta(request.id, [], finish="error", error="no token left to choose"))
            return
        if token in request.stop_token_ids and sequence.position > params.min_tokens:
            delta.finish, delta.stop_token_id = "stop", token
        elif sequence.position == request.max_tokens:
            delta.finish = "length"
        if delta.finish is not None:
            self._end(delta)
        else:
            self.deltas.append(delta)
        if self.options.die_at == sequence.position:
            os._exit(DEATH_CODE)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.0, help="how long a step takes")
    parser.add_argument("--slots", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--fail", default="", help="StartFailed with this message")
    parser.add_argument("--die-early", action="store_true", help="exit before a word is said")
    parser.add_argument("--die-at", type=int, default=-1, help="exit at a sequence's n-th token")
    parser.add_argument("--hang", action="store_true", help="be ready, then never answer")
    return parser.parse_args(arguments)


def _ready(config: EngineConfig) -> Ready:
    return Ready(
        model=config.served_name or "fake",
        architecture="FakeForCausalLM",
        vocab_size=VOCAB_SIZE,
        max_context=config.max_context or MAX_CONTEXT,
        block_size=config.block_size,
        num_blocks=64,
        max_running=config.max_running or MAX_RUNNING,
        dtype="float32",
        device="none",
        backend="script",
        num_parameters=0,
    )


def serve(config: EngineConfig, channel: CoreChannel) -> None:
    """What `millrace.engine.core.main.serve` is to the real core."""
    options = _options(sys.argv[1:])
    if options.die_early:
        os._exit(DEATH_CODE)
    if options.fail:
        channel.send(StartFailed(options.fail))
        return
    channel.send(_ready(config))
    while options.hang:
        time.sleep(1.0)
    core = FakeCore(options)
    while True:
        busy = bool(core.running or core.waiting or core.deltas)
        for message in channel.receive(0.0 if busy else None):
            if isinstance(message, Shutdown):
                return
            core.take(message, channel)
        if core.running or core.waiting or core.deltas:
            channel.send(core.step())
            time.sleep(options.step_s)


if __name__ == "__main__":
    run_core(serve)
