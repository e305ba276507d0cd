"""The channel between the processes: what goes in comes out, and nothing waits for ever."""

import asyncio
import os
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from millrace.engine.core.ipc import FROM_CORE_HIGH_WATER, CoreChannel, FrontChannel
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
from millrace.engine.errors import EngineUnavailable
from millrace.engine.sampling_params import SamplingParams

TIMEOUT_S = 20.0
HELLO = CacheFlushed(0, 0)
READY = Ready("m", "a", 10, 20, 16, 5, 4, "float32", "cpu", "torch", 123)
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


def run(scenario: Callable[[FrontChannel, CoreChannel], Awaitable[None]]) -> None:
    """Run a scenario with both sides connected, within a time limit."""

    async def main() -> None:
        front = FrontChannel()
        core = CoreChannel(front.address)
        try:
            core.send(HELLO)  # until this is here, nobody is connected
            assert await asyncio.wait_for(front.receive(), TIMEOUT_S) == HELLO
            await asyncio.wait_for(scenario(front, core), TIMEOUT_S)
        finally:
            front.close()
            core.close()

    asyncio.run(main())


def receive_all(core: CoreChannel, count: int) -> list[ToCore]:
    messages: list[ToCore] = []
    while len(messages) < count:
        arrived = core.receive(TIMEOUT_S)
        assert arrived, f"{len(messages)} of {count} messages"
        messages += arrived
    return messages


def test_every_message_to_the_core_arrives_as_it_was_in_order():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        sent = [REQUEST, Cancel([1, 2], "stop"), FlushCache(4), Shutdown()]
        for message in sent:
            front.send(message)
        assert receive_all(core, len(sent)) == sent

    run(scenario)


def test_every_message_from_the_core_arrives_as_it_was_in_order():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        sent = [READY, STEP, CacheFlushed(4, 9), StartFailed("no such file: \u00e9")]
        for message in sent:
            core.send(message)
        assert [await front.receive() for _ in sent] == sent

    run(scenario)


def test_receive_waits_no_longer_than_it_is_told():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        began = time.monotonic()
        assert core.receive(0.0) == []
        assert core.receive(0.2) == []
        assert 0.19 <= time.monotonic() - began < 2.0

    run(scenario)


def test_receive_without_a_limit_wakes_for_a_message():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        waiting = asyncio.get_running_loop().run_in_executor(None, core.receive, None)
        await asyncio.sleep(0.05)
        front.send(Shutdown())
        assert await waiting == [Shutdown()]

    run(scenario)


def test_the_front_end_never_waits_for_a_core_that_does_not_read():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        count = 5 * FROM_CORE_HIGH_WATER
        for i in range(count):
            front.send(Cancel([i]))
        assert receive_all(core, count) == [Cancel([i]) for i in range(count)]

    run(scenario)


def test_the_core_pauses_for_a_front_end_that_does_not_read_and_nothing_is_lost():
    count = 4 * FROM_CORE_HIGH_WATER
    padding = Delta(1, list(range(300)))  # so that the kernel's own buffers can't hold them all
    sent: list[int] = []

    def talk(core: CoreChannel) -> None:
        for i in range(count):
            core.send(StepOutput([padding], StepStats(step=i)))
            sent.append(i)

    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        talking = threading.Thread(target=talk, args=(core,))
        talking.start()
        time.sleep(0.5)  # the event loop is stuck: nobody reads
        assert len(sent) < count
        steps = [await front.receive() for _ in range(count)]
        assert [s.stats.step for s in steps if isinstance(s, StepOutput)] == list(range(count))
        talking.join()

    run(scenario)


def test_the_socket_is_for_this_user_alone_and_leaves_nothing_behind():
    front = FrontChannel()
    directory = Path(front.address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert directory.stat().st_uid == os.getuid()
    front.close()
    assert not directory.exists()


def test_an_unlinked_channel_goes_on_working():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        front.unlink()
        assert not Path(front.address.removeprefix("ipc://")).parent.exists()
        front.send(FlushCache(1))
        assert receive_all(core, 1) == [FlushCache(1)]
        core.send(CacheFlushed(1, 2))
        assert await front.receive() == CacheFlushed(1, 2)

    run(scenario)


def test_sending_to_nobody_is_no_error():
    async def main() -> None:
        front = FrontChannel()
        front.send(Shutdown())
        front.close()

    asyncio.run(main())


def test_what_is_no_message_is_an_error_on_either_side():
    async def scenario(front: FrontChannel, core: CoreChannel) -> None:
        front.send(READY)  # type: ignore[arg-type]  # goes the other way
        with pytest.raises(msgspec.ValidationError):
            receive_all(core, 1)
        core.send(Shutdown())  # type: ignore[arg-type]
        with pytest.raises(msgspec.ValidationError):
            await front.receive()

    run(scenario)


def test_a_directory_too_long_for_a_socket_is_said_so(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(EngineUnavailable, match="TMPDIR"):
        FrontChannel()
    assert list(deep.iterdir()) == []
