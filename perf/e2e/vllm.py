"""vLLM on the shapes, prompts and streams of models.py: tokens a second to put beside those.

A part of the suite that runs only where it is named: vLLM compiles its model for a minute or more.
It has a process of its own for each shape (perf/peers/vllm_offline.py), in whatever interpreter has
vLLM; this one's part never touches the device, so that its memory is vLLM's.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Any

from millrace.perf.e2e.drive import Scale, prompt_of, scale_of
from millrace.perf.e2e.row import recorded
from millrace.perf.kernels.session import Session, Skip
from millrace.perf.peers.process import PeerProcess
from millrace.perf.peers.vllm_peer import Size, vllm_peer

WARM_UP_TOKENS = 3
DRY_HEAD_DIM = 32  # the least that vLLM's attention on a CPU has


def run(session: Session) -> None:
    """A part of the suite."""
    if session.vllm_python == sys.executable and find_spec("vllm") is None:
        raise Skip("vllm is not installed here; --vllm-python names a Python that has it")
    scale = scale_of(session.dry_run)
    for name, config in scale.shapes.items():
        if not session.out_of_time():
            _measure_shape(session, scale, name, config)


def _measure_shape(session: Session, scale: Scale, name: str, config: dict[str, Any]) -> None:
    """A row for its start, and one for each number of streams, the most telling first."""
    if session.dry_run:
        config = config | {"head_dim": DRY_HEAD_DIM}
    context = scale.prompt_tokens + scale.output_tokens
    size = Size(max(scale.streams), context)
    dtype = str(scale.dtype).removeprefix("torch.")
    limit_s = session.deadline - time.monotonic()
    with recorded(session, "vllm", f"{name}, start") as started:
        began = time.perf_counter()
        with vllm_peer(session.vllm_python, config, dtype, size, limit_s) as peer:
            started.metric, started.value = "s", time.perf_counter() - began
            started.facts = peer.about
            for streams in scale.streams:
                if not session.out_of_time():
                    _measure_streams(session, scale, name, peer, config["vocab_size"], streams)


def _measure_streams(
    session: Session, scale: Scale, name: str, peer: PeerProcess, vocab: int, streams: int
) -> None:
    with recorded(session, "vllm", f"{name}, {streams} at once") as row:
        prompts = [prompt_of(index, scale, vocab).tolist() for index in range(streams)]
        peer.measure(prompts, WARM_UP_TOKENS)
        row.metric, row.value = "tokens/s", peer.measure(prompts, scale.output_tokens)
        row.facts = {"prompt_tokens": scale.prompt_tokens, "output_tokens": scale.output_tokens}
