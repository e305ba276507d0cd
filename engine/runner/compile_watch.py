"""After the start, a kernel that still has to be compiled is a bug: every stream waits for it."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def warn_of_compiling() -> None:
    """From now on, log a warning for each kernel that Triton compiles in this process."""
    import triton

    def listen(*, src: object, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            name = getattr(src, "name", "a kernel")
            log.warning("%s was compiled while serving: the warm-up did not launch it so", name)

    triton.knobs.compilation.listener = listen
