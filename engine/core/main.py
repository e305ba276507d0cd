"""The core's process: builds an EngineCore and runs its loop between a channel's messages.

`python -m millrace.engine.core.main` is what `process.py` starts.
"""

from __future__ import annotations

import gc
import logging
import os

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.ipc import CoreChannel
from millrace.engine.core.loop import EngineCore
from millrace.engine.core.messages import Shutdown, StartFailed
from millrace.engine.core.process import DEVICE_LOST_EXIT_CODE, run_core
from millrace.engine.core.progress import startup_progress
from millrace.engine.errors import DeviceLost, MillraceError
from millrace.engine.runner.compile_watch import warn_of_compiling
from millrace.engine.weights.locate import resolve

log = logging.getLogger(__name__)


def serve(config: EngineConfig, channel: CoreChannel) -> None:
    """Load the model, say Ready (or StartFailed), and serve until Shutdown."""
    try:
        location = resolve(config.model, config.revision)
        with startup_progress() as progress:
            core, ready = build_core(config, location, progress)
    except MillraceError as error:
        channel.send(StartFailed(str(error)))
        return
    except Exception as error:
        log.exception("the core could not start")
        channel.send(StartFailed(f"{type(error).__name__}: {error}"))
        return
    if ready.backend == "triton":
        warn_of_compiling()
    gc.collect()
    gc.freeze()  # the model's objects live for ever: keep them out of every later collection
    channel.send(ready)
    _loop(core, channel)


def _loop(core: EngineCore, channel: CoreChannel) -> None:
    """Messages in, one step, messages out; asleep while there is nothing to do."""
    while True:
        for message in channel.receive(timeout_s=None if core.is_idle else 0.0):
            if isinstance(message, Shutdown):
                return
            core.handle(message)
        for answer in core.step():
            channel.send(answer)


def main() -> None:
    """Entry point of the process.

    Where the device is lost it ends at once: the front end ends all requests when it sees that, and
    whoever supervises the server starts it again.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        run_core(serve)
    except DeviceLost as error:
        log.critical("%s", error)
        os._exit(DEVICE_LOST_EXIT_CODE)  # destructors would wait for a device that never answers


if __name__ == "__main__":
    main()
