"""The engine core's process: started, watched and ended by the front end.

A fresh interpreter, not a fork: the front end's threads and sockets never leak into the core. The
core's standard input carries one line of JSON (Launch), then nothing; the front end keeps it open
for as long as it lives, so its end tells the core that the front end has gone, however that died.
`CoreProcess` is the front end's half, `run_core` the core's. Knows neither models nor requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from millrace.engine.config import EngineConfig
from millrace.engine.core.ipc import CoreChannel, FrontChannel
from millrace.engine.core.messages import FromCore, Ready, Shutdown, StartFailed, ToCore
from millrace.engine.errors import EngineUnavailable

# -P: the working directory is not searched for modules.
CORE_COMMAND = (sys.executable, "-P", "-m", "millrace.engine.core.main")
STDIN, STDERR = 0, 2  # file descriptors
LAST_WORDS_S = 0.1  # after the core's exit, for what it sent to be read
ORPHAN_EXIT_CODE = 3  # the front end has gone
DEVICE_LOST_EXIT_CODE = 4
SPINS = "10000"
"""How long torch's threads spin for one another before they sleep: tens of microseconds, about what
the host needs between two operations. OpenMP's own choice is to spin for milliseconds, which on a
machine with other work takes the very cores that the awaited threads need."""


class Launch(msgspec.Struct, frozen=True):
    """All that a core is told when it starts."""

    address: str  # of the front end's socket
    config: EngineConfig


# ---------------------------------------------------------------- the front end's half


def core_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The core's environment variables: those given, and SPINS unless they say how to wait."""
    chosen = "OMP_WAIT_POLICY" in given or "GOMP_SPINCOUNT" in given
    return {**given} if chosen else {**given, "GOMP_SPINCOUNT": SPINS}


class CoreProcess:
    """One core process that is ready: see `start`. Belongs to the event loop it was made on."""

    ready: Ready

    def __init__(self, config: EngineConfig, command: Sequence[str]) -> None:
        self._channel = FrontChannel()
        # Its own process group: Ctrl-C in a terminal reaches the front end alone, which drains.
        # What the core prints goes to stderr, because stdout is the front end's.
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=STDERR,
                process_group=0,
                env=core_environment(os.environ),
            )
        except OSError:
            self._channel.close()
            raise
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._reap, name="core-reaper", daemon=True).start()
        assert self._process.stdin is not None, "Popen was asked for a pipe"
        with contextlib.suppress(BrokenPipeError):  # it died already: _exit will tell
            launch = Launch(self._channel.address, config)
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
            self._process.stdin.flush()

    @classmethod
    async def start(
        cls, config: EngineConfig, command: Sequence[str] = CORE_COMMAND
    ) -> CoreProcess:
        """Start a core and wait until it is ready, for as long as it lives: models take their time.

        Raises EngineUnavailable with the core's own message if it can't start, or with its exit
        code if it dies without a word.
        """
        core = cls(config, command)
        try:
            core.ready = await core._first_message()
        except BaseException:
            await core.stop(timeout_s=0.0)
            raise
        core._channel.unlink()  # nothing is left behind, should this process be killed
        return core

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToCore) -> None:
        """Queue one message; never waits. It reaches nobody once the core is dead."""
        self._channel.send(message)

    async def receive(self) -> FromCore:
        """The next message, for as long as it takes: see `wait` for the death of the core."""
        return await self._channel.receive()

    async def wait(self) -> str:
        """Wait for the core's death and for its last messages to be received; says how it died."""
        code = await asyncio.shield(self._exit)
        await asyncio.sleep(LAST_WORDS_S)
        return _describe(code)

    async def stop(self, timeout_s: float) -> None:
        """Ask the core to leave, kill it after `timeout_s` seconds, and free the sockets."""
        if not self._exit.done() and timeout_s > 0:
            self.send(Shutdown())
        try:
            await asyncio.wait_for(asyncio.shield(self._exit), timeout_s)
        except TimeoutError:
            self._process.kill()  # harmless if it has been reaped: Popen checks
            await self._exit
        finally:
            self._process.kill()  # should the wait have been cancelled
            self._channel.close()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()

    async def _first_message(self) -> Ready:
        message = asyncio.ensure_future(self.receive())
        death = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait((message, death), return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                raise EngineUnavailable(f"the engine core {death.result()} before it was ready")
            match message.result():
                case Ready() as ready:
                    return ready
                case StartFailed(message=reason):
                    raise EngineUnavailable(f"the engine core could not start: {reason}")
                case other:
                    raise EngineUnavailable(f"the engine core began with {type(other).__name__}")
        finally:
            message.cancel()
            death.cancel()

    def _reap(self) -> None:
        """Wait for the process in a thread (portable, and free while nothing happens)."""
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            self._exit.get_loop().call_soon_threadsafe(self._set_exit, code)

    def _set_exit(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)


def _describe(code: int) -> str:
    if code == DEVICE_LOST_EXIT_CODE:
        return "lost its device, which only a new process can use again"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


# ---------------------------------------------------------------- the core's half


def run_core(serve: Callable[[EngineConfig, CoreChannel], None]) -> None:
    """Be the core: read the Launch from standard input and run `serve` until it returns.

    `serve(config, channel)` sends Ready or StartFailed first, and returns on Shutdown. Signals that
    ask a process to end are for the front end to answer; the core leaves when it is told to, or
    when the front end is gone.
    """
    for request_to_end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request_to_end, signal.SIG_IGN)
    with open(STDIN, "rb", buffering=0, closefd=False) as stdin:
        launch = msgspec.json.decode(stdin.readline(), type=Launch)
    threading.Thread(target=_leave_with_front_end, name="lifeline", daemon=True).start()
    with CoreChannel(launch.address) as channel:
        serve(launch.config, channel)


def _leave_with_front_end() -> None:
    """End this process at once when standard input ends: nobody is left to serve.

    Reads the descriptor itself: a daemon thread inside sys.stdin would break interpreter shutdown.
    """
    while os.read(STDIN, 1):
        pass
    os._exit(ORPHAN_EXIT_CODE)
