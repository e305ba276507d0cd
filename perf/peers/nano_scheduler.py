"""nano-vllm's scheduler (github.com/GeeeekExplorer/nano-vllm), without its model.

A loop over all requests in plain Python, as short as such a scheduler can be. It is taken from a
checkout: its package imports a GPU library at the top, so only three of its files are loaded.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

from millrace.perf.scheduler_driver import DRAWN, MakeDriver, Prompt, Size, timed

BLOCK_SIZE = 256  # the only one that it takes


def load(checkout: Path | None) -> MakeDriver | str:
    """A maker of drivers, from a checkout or what is installed; or why there is none."""
    folder = _installed() if checkout is None else checkout / "nanovllm"
    if folder is None:
        return "not installed, and --nano-path names no checkout"
    package, config = ModuleType("nanovllm"), ModuleType("nanovllm.config")
    package.__path__ = [str(folder)]
    config.Config = object  # type: ignore[attr-defined]  # a type hint, no more
    stubs = {"nanovllm": package, "nanovllm.config": config}
    sys.modules |= stubs
    try:
        import nanovllm.engine.scheduler  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        for name in stubs:
            del sys.modules[name]
        return f"not installed: {error}"
    return NanoDriver


def _installed() -> Path | None:
    spec = find_spec("nanovllm")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


class NanoDriver:
    """See SchedulerDriver."""

    def __init__(self, size: Size) -> None:
        from nanovllm.engine.scheduler import Scheduler

        self._scheduler = Scheduler(
            SimpleNamespace(
                max_num_seqs=size.running,
                max_num_batched_tokens=size.step_tokens,
                eos=-1,
                kvcache_block_size=BLOCK_SIZE,
                num_kvcache_blocks=size.kv_tokens // BLOCK_SIZE + 2 * size.running,
            )
        )
        self.num_drawn = 0

    def submit(self, prompt: Prompt, max_tokens: int) -> int:
        from nanovllm.engine.sequence import Sequence  # type: ignore[import-not-found]
        from nanovllm.sampling_params import (  # type: ignore[import-not-found]
            SamplingParams,
        )

        settings = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        token_ids = prompt.tolist()
        return timed(lambda: self._scheduler.add(Sequence(token_ids, settings)))[1]

    def step(self) -> int:
        (sequences, is_prefill), planned = timed(self._scheduler.schedule)
        self.num_drawn, drawn = len(sequences), [DRAWN] * len(sequences)
        _, applied = timed(lambda: self._scheduler.postprocess(sequences, drawn, is_prefill))
        return planned + applied

    def cancel(self, number: int) -> int:
        raise NotImplementedError("nano-vllm ends no request before its time")
