"""transformers as a peer: the benchmark's side of transformers_static.py."""

from __future__ import annotations

import sys

from millrace.engine.config import EngineConfig
from millrace.perf.peers.process import PeerProcess

MODULE = "millrace.perf.peers.transformers_static"


def transformers_peer(config: EngineConfig, dtype: str) -> PeerProcess:
    """`dtype` by torch's name; the model and the threads are those of `config`."""
    options = [str(config.threads or 0), dtype, *([config.model] if config.model else [])]
    return PeerProcess([sys.executable, "-P", "-m", MODULE, *options])
