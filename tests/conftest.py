"""What tests of several parts share."""

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def one_event_loop(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.run, on one event loop for all tests.

    grpc.aio has one thread for a process that wakes its loops. It dies of an event that comes for a
    loop which has been closed, and then every later call waits for ever.
    """
    monkeypatch.setattr(asyncio, "run", runner.run)
