"""What Prometheus sees of Millrace, and the only importer of prometheus_client.

Fed by values (StepStats of each step, FinishedRequest of each request, the status of each call);
it asks nobody anything, so a scrape can't disturb the engine. One registry a server, no globals.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from itertools import islice
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from millrace.engine.core.messages import Ready, StepStats
from millrace.engine.output import FinishedRequest

# Seconds. From a step of a small model on a GPU to a long prompt on a CPU: 1-2-5 up to a minute or
# more, with the steps finer where latency targets usually lie.
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LATENCY_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75),
    *(1, 2, 3, 5, 7.5, 10, 20, 30, 60, 120, 300, 600, 1800),
)
MAX_TENANTS = 100  # with series of their own; a client can name any number
OTHER_TENANTS = "other"
_COUNTS = tuple(2**i for i in range(11))  # 1 .. 1024 requests
_TOKENS = tuple(2**i for i in range(0, 16))  # 1 .. 32,768 tokens


class Metrics:
    """The server's metrics in a registry of their own. Not thread safe: feed it from one loop."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, tenants: Iterable[str] = ()) -> None:
        """The first MAX_TENANTS of `tenants` have series of their own, all others share one."""
        self._tenants = frozenset(islice(tenants, MAX_TENANTS))
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._build = Info("millrace_build", "Version of Millrace", registry=self._registry)
        self._build.info({"version": version("millrace")})
        self._make_request_metrics()
        self._make_step_metrics()

    def _make_request_metrics(self) -> None:
        self._requests = self._counter("requests", "Ended requests by outcome", ["outcome"])
        self._refused = self._counter("refused", "Refused requests by reason", ["reason"])
        self._calls = self._counter("grpc_calls", "Ended gRPC calls by status", ["method", "code"])
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self._output_tokens = self._counter("output_tokens", "Output tokens of ended requests")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens whose KV was reused")
        self._tenant_tokens = self._counter(
            "tenant_tokens", "Tokens of ended requests by tenant", ["tenant", "kind"]
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", _LATENCY_S
        )
        self._gap = self._histogram(
            "inter_token_latency_seconds", "Between the tokens of a request", _STEP_S
        )
        self._total = self._histogram("e2e_latency_seconds", "Arrival to end", _LATENCY_S)
        self._queue = self._histogram(
            "queue_seconds", "Arrival to first given to the device", _LATENCY_S, ["priority"]
        )
        self._prefill = self._histogram(
            "prefill_seconds", "First given to the device to first token", _LATENCY_S
        )

    def _make_step_metrics(self) -> None:
        self._steps = self._histogram("step_seconds", "Launch of a step to its result", _STEP_S)
        self._host = self._histogram("step_host_seconds", "Of a step, spent on the host", _STEP_S)
        self._batch = self._histogram("batch_size", "Requests in the batch of a step", _COUNTS)
        self._step_tokens = self._histogram("step_tokens", "Tokens computed in a step", _TOKENS)
        self._running = self._gauge("running", "Requests in the batch")
        self._waiting = self._gauge("waiting", "Requests in the queue")
        self._blocks_total = self._gauge("kv_blocks_total", "KV blocks there are")
        self._blocks_used = self._gauge("kv_blocks_used", "KV blocks held by running requests")
        self._blocks_cached = self._gauge("kv_blocks_cached", "KV blocks kept for reuse, free")
        self._usage = self._gauge("kv_usage_ratio", "Used KV blocks over all, 0 to 1")
        self._hits = self._counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache")
        self._queries = self._counter(
            "prefix_query_tokens", "Prompt tokens looked up in the prefix cache"
        )
        self._evicted = self._counter(
            "prefix_evicted_blocks", "Cached KV blocks whose room was needed"
        )
        self._swapped_out = self._counter(
            "swapped_out_blocks", "KV blocks copied to the host, of requests that yielded"
        )
        self._swapped_in = self._counter("swapped_in_blocks", "KV blocks copied back from the host")
        self._preemptions = self._counter("preemptions", "Running requests put back in the queue")
        self._shed = self._counter(
            "shed", "Waiting requests ended since their deadline could not be met any more"
        )

    def _counter(self, name: str, help: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"millrace_{name}", help, labels or (), registry=self._registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"millrace_{name}", help, registry=self._registry)

    def _histogram(
        self, name: str, help: str, buckets: Any, labels: list[str] | None = None
    ) -> Histogram:
        name = f"millrace_{name}"
        return Histogram(name, help, labels or (), buckets=buckets, registry=self._registry)

    def model_ready(self, model: Ready) -> None:
        """Note which model is served, and how."""
        labels = {"model": model.model, "device": model.device, "dtype": model.dtype}
        self._build.info({"version": version("millrace"), "backend": model.backend, **labels})
        self._blocks_total.set(model.num_blocks)

    def step_done(self, stats: StepStats) -> None:
        """Take one step of the core."""
        tokens = stats.prefill_tokens + stats.decode_tokens
        if tokens:  # a turn without work is no step of the device
            self._steps.observe(stats.step_s)
            self._host.observe(stats.host_s)
            self._batch.observe(stats.running)
            self._step_tokens.observe(tokens)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._blocks_total.set(stats.blocks_total)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_cached.set(stats.blocks_cached)
        self._usage.set(stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        self._hits.inc(stats.prefix_hit_tokens)
        self._queries.inc(stats.prefix_query_tokens)
        self._evicted.inc(stats.evicted_blocks)
        self._swapped_out.inc(stats.swapped_out_blocks)
        self._swapped_in.inc(stats.swapped_in_blocks)
        self._preemptions.inc(stats.preemptions)
        self._shed.inc(stats.shed)

    def request_finished(self, request: FinishedRequest) -> None:
        """Take one ended request; times are only counted for phases that it reached."""
        self._requests.labels(request.outcome).inc()
        if request.refusal:
            self._refused.labels(request.refusal).inc()
        self._count_tokens(request)
        self._total.observe(request.total_s)
        if request.queue_s is not None:
            self._queue.labels(str(request.priority)).observe(request.queue_s)
        phases = (
            (self._prefill, request.prefill_s),
            (self._first_token, request.first_token_s),
        )
        for histogram, seconds in phases:
            if seconds is not None:
                histogram.observe(seconds)
        for gap_s in request.itl_s:
            self._gap.observe(gap_s)

    def _count_tokens(self, request: FinishedRequest) -> None:
        tenant = request.tenant if request.tenant in self._tenants else OTHER_TENANTS
        for kind, total, tokens in (
            ("prompt", self._prompt_tokens, request.prompt_tokens),
            ("cached", self._cached_tokens, request.cached_tokens),
            ("output", self._output_tokens, request.output_tokens),
        ):
            total.inc(tokens)
            self._tenant_tokens.labels(tenant, kind).inc(tokens)

    def call_ended(self, method: str, code: str) -> None:
        """Take one gRPC call: its short method name and its status."""
        self._calls.labels(method, code).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)
