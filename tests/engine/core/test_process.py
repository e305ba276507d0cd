"""The core's process: how it starts, how it ends, and that it never outlives the front end."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.core.messages import CacheFlushed, FlushCache
from millrace.engine.core.process import SPINS, CoreProcess, core_environment
from millrace.engine.errors import EngineUnavailable
from tests.engine.fake_core import DEATH_CODE, FLUSHED_BLOCKS, fake_core_command

TIMEOUT_S = 30.0


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def answers(core: CoreProcess) -> None:
    """Assert that the core is alive."""
    core.send(FlushCache(5))
    assert await core.receive() == CacheFlushed(5, FLUSHED_BLOCKS)


def test_a_core_gets_its_config_answers_and_leaves_when_asked():
    async def scenario() -> None:
        config = EngineConfig(served_name="näme with spaces", max_context=77, max_running=3)
        core = await CoreProcess.start(config, fake_core_command())
        ready = core.ready
        assert (ready.model, ready.max_context, ready.max_running) == ("näme with spaces", 77, 3)
        await answers(core)
        await core.stop(TIMEOUT_S)
        assert await core.wait() == "exited with code 0"
        assert not alive(core.pid)

    run(scenario())


def test_the_core_s_threads_soon_sleep_unless_told_how_to_wait():
    assert core_environment({"A": "1"}) == {"A": "1", "GOMP_SPINCOUNT": SPINS}
    for told in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        assert core_environment(told) == told


def test_a_core_that_cannot_start_says_why():
    async def scenario() -> None:
        with pytest.raises(EngineUnavailable, match=r"could not start: model\.bin is truncated"):
            await CoreProcess.start(
                EngineConfig(), fake_core_command("--fail", "model.bin is truncated")
            )

    run(scenario())


def test_a_core_that_dies_while_it_starts_is_noticed():
    async def scenario() -> None:
        with pytest.raises(EngineUnavailable, match=f"exited with code {DEATH_CODE} before"):
            await CoreProcess.start(EngineConfig(), fake_core_command("--die-early"))

    run(scenario())


def test_a_command_that_does_not_exist_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def scenario() -> None:
        with pytest.raises(OSError):
            await CoreProcess.start(EngineConfig(), ["/no/such/program"])

    run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_starting_can_be_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pids: list[int] = []

    async def scenario() -> None:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        starting = asyncio.create_task(CoreProcess.start(EngineConfig(), command))
        await asyncio.sleep(0.2)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        pids.extend(pid for pid in map(int, children) if b"sleep(60)" in cmdline(pid))
        assert len(pids) == 1
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(scenario())
    assert not alive(pids[0])
    assert list(tmp_path.iterdir()) == []


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_death_is_noticed_at_once_and_named():
    async def scenario() -> None:
        core = await CoreProcess.start(EngineConfig(), fake_core_command())
        waiting = asyncio.create_task(core.wait())
        await asyncio.sleep(0.05)
        began = time.monotonic()
        os.kill(core.pid, signal.SIGKILL)
        assert await waiting == "was killed by SIGKILL"
        assert time.monotonic() - began < 1.0
        core.send(FlushCache(1))  # reaches nobody, and hurts nobody
        await core.stop(TIMEOUT_S)

    run(scenario())


def test_signals_that_end_a_terminals_processes_are_left_to_the_front_end():
    async def scenario() -> None:
        core = await CoreProcess.start(EngineConfig(), fake_core_command())
        assert os.getpgid(core.pid) != os.getpgid(0)
        os.kill(core.pid, signal.SIGINT)
        os.kill(core.pid, signal.SIGTERM)
        await answers(core)
        await core.stop(TIMEOUT_S)

    run(scenario())


def test_a_core_that_hangs_is_killed_after_the_timeout():
    async def scenario() -> None:
        core = await CoreProcess.start(EngineConfig(), fake_core_command("--hang"))
        began = time.monotonic()
        await core.stop(0.3)
        assert 0.29 <= time.monotonic() - began < 2.0
        assert not alive(core.pid)

    run(scenario())


def test_a_running_core_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def scenario() -> None:
        core = await CoreProcess.start(EngineConfig(), fake_core_command())
        assert list(tmp_path.iterdir()) == []
        await answers(core)
        await core.stop(TIMEOUT_S)

    run(scenario())


PARENT = """
    import asyncio
    from millrace.engine.config import EngineConfig
    from millrace.engine.core.process import SPINS, CoreProcess, core_environment
    from tests.engine.fake_core import fake_core_command

    async def main():
        core = await CoreProcess.start(EngineConfig(), fake_core_command({options}))
        print(core.pid, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


@pytest.mark.parametrize("options", ["", "'--hang'"])
def test_the_core_dies_with_a_front_end_that_is_killed(options):
    script = textwrap.dedent(PARENT).format(options=options)
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone_by = time.monotonic() + 5.0
    while alive(pid):
        assert time.monotonic() < gone_by, "the core outlived its front end"
        time.sleep(0.02)
