"""vLLM as a peer: the benchmark's side of vllm_offline.py, which runs in any Python that has it.

Random weights of the same shape: speed depends on shapes, and vLLM reads no GGUF by itself. Dtype,
context and streams are equal, and there is no prefix cache, as no two prompts have anything in
common. What is not said here is vLLM's default: how many tokens a step has, that it compiles its
model and captures graphs. Only its engine core is no process of its own, so that one kill ends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from millrace.perf.peers.process import PeerProcess

PROGRAM = Path(__file__).with_name("vllm_offline.py")
MEMORY_SHARE = 0.85  # of a GPU
CPU_CACHE_GIB = 4


@dataclass(frozen=True, slots=True)
class Size:
    """What it must hold."""

    streams: int
    context_tokens: int


@contextmanager
def vllm_peer(
    python: str,
    config: dict[str, Any],
    dtype: str,
    size: Size,
    limit_s: float | None = None,
    threads: int | None = None,
) -> Iterator[PeerProcess]:
    """`config` is a config.json; `dtype` by torch's name; `threads` for a CPU, None: vLLM's own.

    Raises PeerFailed where it does not come up.
    """
    with TemporaryDirectory(prefix="millrace-vllm-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options = {
            "model": folder,
            "dtype": dtype,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": size.context_tokens,
            "max_num_seqs": size.streams,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": MEMORY_SHARE,
        }
        command = [python, "-P", str(PROGRAM), json.dumps(options)]
        with PeerProcess(command, limit_s, os.environ | _settings(threads)) as peer:
            yield peer


def _settings(threads: int | None) -> dict[str, str]:
    found = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own way takes a core away
    }
    return found if threads is None else found | {"OMP_NUM_THREADS": str(threads)}
