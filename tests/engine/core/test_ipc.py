"""The channel between the processes: what goes in comes out, and nothing waits for ever."""

import asyncio
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from millrace.engine.core.ipc import CoreChannel, FrontChannel
from millrace.engine.core.messages import (
    Cancel,
    CacheFlushed,
    Delta,
    FlushCache,
    NewRequest,
    Shutdown,
    StepOutput,
    StepStats,
    TokenLogprobs,
)
from millrace.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.5, logit_bias={3: -1.5}, seed=2**63 - 1, stop_token_ids=[7])
REQUEST = NewRequest(
    id=2**40,
    prompt=b"\x01\0\0\0",
    params=PARAMS,
    max_tokens=3,
    stop_token_ids=[7],
    arrival_s=1.25,
    deadline_s=None,
    leader=3,
)
LOGPROBS = [TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, -1.0])]
STEP = StepOutput(
    [
        Delta(1, [5], logprobs=LOGPROBS, prompt_logprobs=LOGPROBS, scheduled_s=0.5),
        Delta(2, [], finish="refused", error="full", field="prompt", retry_after_s=1.5),
    ],
    StepStats(step=9, running=2),
)


@pytest.fixture
async def front_and_core():
    """Only for tests that run inside `asyncio.run`: see `connected`."""


class Connected:
    """Both sides in one process."""

    def __init__(self) -> None:
        self.front = FrontChannel()
        self.core = CoreChannel(self.front.address)

    def __enter__(self) -> "Connected":
        return self

    def __exit__(self, *_: object) -> None:
        self.front.close()
        self.core.close()


def run(scenario) -> None:
    """Run a scenario of (front, core) on an event loop."""

    async def main() -> None:
        with Connected() as both:
            both.core.send(CacheFlushed(0, 0))  # until this is here, nobody is connected
            await both.front.receive()
            await asyncio.wait_for(scenario(both.front, both.core), 20)

    asyncio.run(main())
