"""`millrace bench`: tokens/s at rising concurrency, where the CPU time went, and a peer beside.

Every level runs once in each repetition, in an order that turns round from one repetition to the
next, so that a machine that warms up or slows down favours nobody. Prompts are new each time: the
prefix cache has nothing to offer. Peers wait in processes of their own and take their turns.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import yaml
from rich.console import Console

from millrace.engine.config import EngineConfig
from millrace.engine.errors import EngineUnavailable, MillraceError
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.engine.weights.locate import resolve
from millrace.perf.bench_report import (
    CpuUse,
    Level,
    PeerLevel,
    findings,
    result_of,
    table_of,
    tenant_findings,
)
from millrace.perf.cpu_time import cpu_seconds_of_tree
from millrace.perf.environment import environment
from millrace.perf.loadgen.drive import Run, closed_loop
from millrace.perf.loadgen.report import summarize
from millrace.perf.loadgen.tenants import Tenant, assign, by_tenant
from millrace.perf.loadgen.transport import GenerateSender
from millrace.perf.loadgen.workload import random_ids, random_requests
from millrace.perf.peers.process import PeerFailed, PeerProcess
from millrace.perf.peers.transformers_peer import transformers_peer
from millrace.perf.peers.vllm_peer import Size, vllm_peer
from millrace.perf.server_process import ServerProcess, metric
from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceStub

PEER_DTYPES = {
    "transformers": "bfloat16",
    "transformers-fp32": "float32",
    "vllm": "bfloat16",
    "vllm-fp32": "float32",
}
WARM_UP_TOKENS = 4
WARM_UP_SEED = 2**31  # of prompts that no measurement uses


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    levels: tuple[int, ...]  # concurrent streams
    repeats: int
    prompt_tokens: int
    output_tokens: int
    peers: tuple[str, ...]  # names in PEER_DTYPES
    seed: int
    peer_streams: tuple[int, ...] = (16,)  # of each peer
    tenants: tuple[Tenant, ...] = ()  # who sends; none: nobody by name
    vllm_python: str = sys.executable  # an interpreter that can import vLLM


def run(plan: Plan, config: EngineConfig, target: str | None, json_file: Path | None) -> None:
    """Measure, print a table, and end with one line of JSON (also in `json_file`).

    Raises MillraceError if the server or any request fails: there are no figures then.
    """
    found_at = environment(plan.seed)
    with ExitStack() as stack:
        server = None if target is not None else stack.enter_context(_start_server(config))
        peers = {name: _enter(stack, name, plan, config) for name in plan.peers}
        bench = Bench(plan, target or (server.target if server else ""), server)
        levels, peer_levels, options = asyncio.run(bench.measure(peers))
        about = {name: peer.about for name, peer in peers.items()}
    Console().print(table_of(levels))
    result = result_of(levels, peer_levels) | {"peer_versions": about}
    for line in [*findings(result), *tenant_findings(levels)]:
        print(line)
    text = json.dumps({"environment": found_at, "server": options, "plan": asdict(plan), **result})
    if json_file is not None:
        json_file.write_text(text + "\n")
    print(text)


class Bench:
    """The runs against one server; `server` is None where its processes are not ours to watch."""

    def __init__(self, plan: Plan, target: str, server: ServerProcess | None) -> None:
        self._plan = plan
        self._target = target
        self._server = server

    async def measure(
        self, peers: Mapping[str, PeerProcess]
    ) -> tuple[list[Level], list[PeerLevel], dict[str, Any]]:
        """All repetitions; returns the levels, those of the peers, and the server."""
        plan = self._plan
        levels = [Level(streams) for streams in plan.levels]
        peer_levels = [PeerLevel(name, n) for name in peers for n in plan.peer_streams]
        async with grpc.aio.insecure_channel(self._target) as channel:
            inference = InferenceStub(channel)  # type: ignore[no-untyped-call]
            try:
                model = await inference.GetModel(pb.GetModelRequest(), timeout=60)
            except grpc.aio.AioRpcError as error:
                message = f"no server answers at {self._target}: {error.code().name}"
                raise EngineUnavailable(message) from error
            vocab_size = model.vocab_size
            await self._run(inference, vocab_size, plan.levels[-1], WARM_UP_TOKENS, None)
            for peer_level in peer_levels:
                peer = peers[peer_level.name]
                await self._ask(peer, vocab_size, peer_level.streams, WARM_UP_TOKENS, None)
            for repeat in range(plan.repeats):
                turns: Sequence[Level | PeerLevel] = [*levels, *peer_levels]
                for turn in turns if repeat % 2 == 0 else reversed(turns):
                    if isinstance(turn, Level):
                        await self._measure_level(inference, vocab_size, turn, repeat)
                    else:
                        await self._measure_peer(peers[turn.name], vocab_size, turn, repeat)
        return levels, peer_levels, _describe(model)

    async def _measure_peer(
        self, peer: PeerProcess, vocab_size: int, level: PeerLevel, repeat: int
    ) -> None:
        tokens = self._plan.output_tokens
        level.rates.append(await self._ask(peer, vocab_size, level.streams, tokens, repeat))
        _say(f"{level.name}, {level.streams} streams: {level.rates[-1]:.1f} tokens/s")

    async def _ask(
        self,
        peer: PeerProcess,
        vocab_size: int,
        streams: int,
        output_tokens: int,
        repeat: int | None,
    ) -> float:
        """One batch of a peer: the prompts that so many streams of Millrace's have."""
        seed, length = self._seed(streams, repeat), self._plan.prompt_tokens
        prompts = [random_ids(length, vocab_size, [*seed, row]) for row in range(streams)]
        try:
            return await asyncio.to_thread(peer.measure, prompts, output_tokens)
        except PeerFailed as error:
            raise MillraceError(f"a peer failed: {error}") from error

    def _seed(self, streams: int, repeat: int | None) -> list[int]:
        return [self._plan.seed, WARM_UP_SEED if repeat is None else repeat, streams]

    async def _measure_level(
        self, inference: InferenceStub, vocab_size: int, level: Level, repeat: int
    ) -> None:
        before = self._cpu_now()
        done = await self._run(
            inference, vocab_size, level.streams, self._plan.output_tokens, repeat
        )
        summary = summarize(done)
        level.summaries.append(summary)
        level.tenants.append(by_tenant(done))
        after = self._cpu_now()
        if before is not None and after is not None:
            spent = (late - early for late, early in zip(after, before, strict=True))
            level.cpu.append(CpuUse(*spent))
        _say(f"{level.streams} streams: {summary.output_tokens_per_s:.1f} tokens/s")

    async def _run(
        self,
        inference: InferenceStub,
        vocab_size: int,
        streams: int,
        output_tokens: int,
        repeat: int | None,
    ) -> Run:
        """One closed loop of as many requests as streams: all start together, as a batch would."""
        plan = self._plan
        seed = self._seed(streams, repeat)
        requests = random_requests(streams, plan.prompt_tokens, output_tokens, vocab_size, seed)
        assign(requests, plan.tenants)
        done = await closed_loop(GenerateSender(inference), requests, streams)
        failed = [record for record in done.records if not record.ok]
        if failed:
            message = f"{len(failed)} of {streams} requests failed: "
            raise MillraceError(f"{message}{failed[0].status}: {failed[0].message}")
        return done

    def _cpu_now(self) -> tuple[float, float, float] | None:
        """The fields of CpuUse, since the server's start."""
        if self._server is None:
            return None
        seconds = cpu_seconds_of_tree(self._server.pid)
        scheduler_s = metric(self._server.metrics(), "millrace_step_host_seconds_sum")
        return seconds[self._server.pid], scheduler_s, sum(seconds.values())


@contextmanager
def _start_server(config: EngineConfig) -> Iterator[ServerProcess]:
    """A server with the settings of `config`, on ports of its own."""
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "bench.yaml"
        file.write_text(yaml.safe_dump(settings))
        with ServerProcess(["--config", str(file)]) as server:
            yield server


def _enter(stack: ExitStack, name: str, plan: Plan, config: EngineConfig) -> PeerProcess:
    """A peer that is ready; MillraceError, with its last words, where it does not come up."""
    _say(f"starting {name}")
    try:
        return stack.enter_context(_start_peer(name, plan, config))
    except PeerFailed as error:
        raise MillraceError(f"{name} does not start: {error}") from error


def _start_peer(name: str, plan: Plan, config: EngineConfig) -> AbstractContextManager[PeerProcess]:
    dtype = PEER_DTYPES[name]
    if name.startswith("transformers"):
        return transformers_peer(config, dtype)
    found = open_checkpoint(resolve(config.model, config.revision).path).config
    context = plan.prompt_tokens + plan.output_tokens
    size = Size(max(plan.peer_streams), context)
    return vllm_peer(plan.vllm_python, found, dtype, size, threads=config.threads)


def _describe(model: pb.GetModelResponse) -> dict[str, Any]:
    """What the server says of itself."""
    names = ("name", "dtype", "device", "backend", "kv_blocks", "max_running")
    return {name: getattr(model, name) for name in names}


def _say(line: str) -> None:
    """Progress, apart from the results."""
    Console(stderr=True).print(line, style="dim", highlight=False)
