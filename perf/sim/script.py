"""What a fake model would say: every token is a function of the tokens before it and of a seed.

So the outcome of a request is known before it runs, and no schedule may change it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from millrace.scheduler.request import Finish, Request

MODULUS = 2**61 - 1
VOCAB = 6  # few tokens, so that prefixes are shared and stop tokens come up
NO_PREFIX = 1


@dataclass(frozen=True, slots=True)
class Script:
    """A request's sampling, as the runner would read it from `Request.payload`."""

    seed: int
    stop_tokens: frozenset[int] = frozenset()
    fails_at: int | None = None  # index of the output that can't be drawn
    luck: int = 0  # of a hundred drafts so many are right


def extend(prefix: int, token: int) -> int:
    """The hash of a prefix with one more token: stands for the KV of that position."""
    return (prefix * 1_000_003 + token + 7) % MODULUS


def draw(prefix: int, seed: int) -> int:
    """The token that follows a prefix."""
    return (prefix * 2_654_435_761 + seed * 40_503) % MODULUS % VOCAB


def guess(prefix: int, script: Script) -> int:
    """A draft of the token that follows a prefix."""
    token = draw(prefix, script.seed)
    is_right = prefix * 48_271 % MODULUS % 100 < script.luck
    return token if is_right else (token + 1) % VOCAB


def hashes(tokens: Iterable[int]) -> list[int]:
    """One hash a position, of all tokens up to and with it."""
    found, prefix = [], NO_PREFIX
    for token in tokens:
        prefix = extend(prefix, token)
        found.append(prefix)
    return found


def expected(request: Request) -> tuple[list[int], Finish]:
    """What the request must give if nothing interrupts it."""
    script = request.payload
    assert isinstance(script, Script)
    prefix = hashes(request.prompt.tolist())[-1]
    outputs: list[int] = []
    while len(outputs) < request.max_tokens:
        if len(outputs) == script.fails_at:
            return outputs, Finish.ERROR
        token = draw(prefix, script.seed)
        outputs.append(token)
        if token in script.stop_tokens:
            return outputs, Finish.STOP
        prefix = extend(prefix, token)
    return outputs, Finish.LENGTH
