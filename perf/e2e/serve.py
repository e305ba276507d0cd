"""`millrace serve` on the device, as a process of its own, and gRPC streams that it answers.

The built-in model where its weights are on this machine; else a small one of random weights, saved
to a folder for the occasion. Slow or not, what this shows is that the whole of it starts and works.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from millrace.engine.weights.builtin import SMOLLM2, is_here
from millrace.perf.e2e.row import recorded
from millrace.perf.kernels.session import Session
from millrace.perf.loadgen.drive import closed_loop
from millrace.perf.loadgen.report import Summary, summarize
from millrace.perf.loadgen.transport import GenerateSender
from millrace.perf.loadgen.workload import random_requests
from millrace.perf.random_model import SMALL, TINY, RandomCheckpoint
from millrace.perf.server_process import ServerProcess
from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceStub

STREAMS, DRY_STREAMS = 16, 2
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 32
OPTIONS = ("--max-running", "32")  # graphs are captured for no more


def run(session: Session) -> None:
    """A part of the suite."""
    name, config = (SMOLLM2.name, None) if _has_builtin(session) else ("random weights", SMALL)
    if session.dry_run:
        config = TINY
    streams = DRY_STREAMS if session.dry_run else STREAMS
    with recorded(session, "served", f"{name}, {streams} at once") as row, _model(config) as model:
        began = time.perf_counter()
        with ServerProcess([*model, *OPTIONS, "--device", session.device.type]) as server:
            started_s = time.perf_counter() - began
            summary = asyncio.run(_answers(server.target, streams))
            code = server.stop()
        if summary.successful != streams or code:
            raise RuntimeError(f"{summary.failures} failed, exit code {code}")
        row.metric, row.value = "tokens/s", summary.output_tokens_per_s
        row.facts = {"start_s": started_s, "ttft_ms": summary.ttft.median}


def _has_builtin(session: Session) -> bool:
    return not session.dry_run and is_here(SMOLLM2)


async def _answers(target: str, streams: int) -> Summary:
    """What came of so many streams at once."""
    async with grpc.aio.insecure_channel(target) as channel:
        inference = InferenceStub(channel)  # type: ignore[no-untyped-call]
        model = await inference.GetModel(pb.GetModelRequest(), wait_for_ready=True)
        requests = random_requests(streams, PROMPT_TOKENS, OUTPUT_TOKENS, model.vocab_size, [0])
        return summarize(await closed_loop(GenerateSender(inference), requests, streams))


@contextmanager
def _model(config: dict[str, Any] | None) -> Iterator[list[str]]:
    """The options that name a model: none for the built-in one, else a folder made for it."""
    if config is None:
        yield []
        return
    with TemporaryDirectory(prefix="millrace-random-") as folder:
        save_random(config, Path(folder))
        yield ["--model", folder]


def save_random(config: dict[str, Any], folder: Path) -> None:
    """A model of random weights as a folder of Hugging Face's layout; its words are bytes."""
    checkpoint = RandomCheckpoint(config, torch.device("cpu"), torch.float32)
    tensors = {name: checkpoint.load(name) for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate([*special, *alphabet])}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
