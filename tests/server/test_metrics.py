"""Metrics: each value that is fed comes out under its name."""

import dataclasses
import re

from prometheus_client.parser import text_string_to_metric_families

from millrace.engine.core.messages import Ready, StepStats
from millrace.engine.errors import (
    DuplicateRequest,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    StepFailed,
)
from millrace.engine.output import FinishedRequest, refusal
from millrace.engine.server.metrics import MAX_TENANTS, Metrics

STATS = StepStats(
    step=7,
    running=3,
    waiting=2,
    blocks_total=100,
    blocks_used=25,
    blocks_cached=10,
    prefill_tokens=60,
    decode_tokens=4,
    preemptions=1,
    prefix_hit_tokens=32,
    prefix_query_tokens=48,
    evicted_blocks=5,
    swapped_out_blocks=6,
    swapped_in_blocks=3,
    shed=2,
    step_s=0.004,
    host_s=0.001,
)
FINISHED = FinishedRequest(
    outcome="length",
    prompt_tokens=12,
    cached_tokens=8,
    output_tokens=3,
    queue_s=0.1,
    prefill_s=0.2,
    first_token_s=0.3,
    total_s=0.5,
    itl_s=[0.1, 0.1],
    priority=3,
    tenant="acme",
)


def samples(metrics: Metrics) -> dict[str, float]:
    text = metrics.render().decode()
    return {
        sample.name + "".join(f"[{k}={v}]" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_step_sets_gauges_and_adds_counters() -> None:
    metrics = Metrics()
    metrics.step_done(STATS)
    metrics.step_done(STATS)
    values = samples(metrics)
    assert values["millrace_running"] == 3
    assert values["millrace_waiting"] == 2
    assert values["millrace_kv_blocks_used"] == 25
    assert values["millrace_kv_blocks_total"] == 100
    assert values["millrace_kv_blocks_cached"] == 10
    assert values["millrace_kv_usage_ratio"] == 0.25
    assert values["millrace_preemptions_total"] == 2
    assert values["millrace_prefix_evicted_blocks_total"] == 10
    assert values["millrace_swapped_out_blocks_total"] == 12
    assert values["millrace_swapped_in_blocks_total"] == 6
    assert values["millrace_shed_total"] == 4
    assert values["millrace_prefix_hit_tokens_total"] == 64
    assert values["millrace_prefix_query_tokens_total"] == 96
    assert values["millrace_step_seconds_count"] == 2
    assert values["millrace_step_tokens_sum"] == 128
    assert values["millrace_batch_size_sum"] == 6


def test_a_turn_without_work_is_no_step() -> None:
    metrics = Metrics()
    metrics.step_done(StepStats(waiting=1))
    values = samples(metrics)
    assert values["millrace_step_seconds_count"] == 0 and values["millrace_waiting"] == 1
    assert values["millrace_kv_usage_ratio"] == 0


def test_a_finished_request_is_counted_by_outcome_with_its_times() -> None:
    metrics = Metrics()
    metrics.request_finished(FINISHED)
    values = samples(metrics)
    assert values["millrace_requests_total[outcome=length]"] == 1
    assert values["millrace_prompt_tokens_total"] == 12
    assert values["millrace_cached_tokens_total"] == 8
    assert values["millrace_output_tokens_total"] == 3
    assert values["millrace_time_to_first_token_seconds_sum"] == 0.3
    assert values["millrace_inter_token_latency_seconds_count"] == 2
    assert values["millrace_queue_seconds_sum[priority=3]"] == 0.1
    assert values["millrace_prefill_seconds_sum"] == 0.2
    assert values["millrace_e2e_latency_seconds_sum"] == 0.5


def test_a_request_that_never_ran_has_no_first_token() -> None:
    metrics = Metrics()
    metrics.request_finished(FinishedRequest(outcome="refused", total_s=0.01))
    values = samples(metrics)
    assert values["millrace_requests_total[outcome=refused]"] == 1
    assert values["millrace_time_to_first_token_seconds_count"] == 0
    assert not any(name.startswith("millrace_queue_seconds_count") for name in values)
    assert values["millrace_e2e_latency_seconds_count"] == 1


def test_refusals_are_counted_by_reason() -> None:
    metrics = Metrics()
    for error in (
        Overloaded("full", "max_waiting", "at most 1"),
        InvalidRequest("bad", "top_p", "(0, 1]"),
        DuplicateRequest("twice", "request_id", "unique"),
        EngineUnavailable("draining"),
    ):
        metrics.request_finished(FinishedRequest("refused", refusal=refusal(error)))
    values = samples(metrics)
    for reason in ("max_waiting", "invalid", "duplicate", "unavailable"):
        assert values[f"millrace_refused_total[reason={reason}]"] == 1
    assert refusal(StepFailed("NaN")) == refusal(None) == ""


def test_tokens_are_counted_by_the_configured_tenants_and_all_others_together() -> None:
    metrics = Metrics(["acme", "idle"])
    metrics.request_finished(FINISHED)
    for index in range(1000):  # whatever names a client makes up
        metrics.request_finished(dataclasses.replace(FINISHED, tenant=f"nobody-{index}"))
    metrics.request_finished(dataclasses.replace(FINISHED, tenant=""))
    values = samples(metrics)
    tokens = {name: value for name, value in values.items() if "tenant_tokens_total" in name}
    assert tokens == {
        f"millrace_tenant_tokens_total[kind={kind}][tenant={tenant}]": requests * each
        for kind, each in (("prompt", 12), ("cached", 8), ("output", 3))
        for tenant, requests in (("acme", 1), ("other", 1001))
    }


def test_however_many_tenants_are_configured_the_series_are_bounded() -> None:
    metrics = Metrics(f"tenant-{index}" for index in range(10 * MAX_TENANTS))
    for index in range(10 * MAX_TENANTS):
        metrics.request_finished(FinishedRequest("stop", tenant=f"tenant-{index}"))
    names = {name for name in samples(metrics) if "tenant_tokens_total[kind=output]" in name}
    assert len(names) == MAX_TENANTS + 1


def test_calls_are_counted_by_method_and_status() -> None:
    metrics = Metrics()
    metrics.call_ended("Generate", "INVALID_ARGUMENT")
    name = "millrace_grpc_calls_total[code=INVALID_ARGUMENT][method=Generate]"
    assert samples(metrics)[name] == 1


def test_the_build_names_version_and_model() -> None:
    metrics = Metrics()
    metrics.model_ready(Ready("m", "llama", 99, 64, 16, 8, 4, "float32", "cpu", "torch", 10))
    info = re.search(r"millrace_build_info\{(.*)\} 1.0", metrics.render().decode())
    assert info is not None
    assert 'model="m"' in info[1] and 'backend="torch"' in info[1] and "version=" in info[1]


def test_two_servers_in_one_process_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.request_finished(FINISHED)
    assert "millrace_requests_total[outcome=length]" not in samples(other)
    assert samples(other)["millrace_prompt_tokens_total"] == 0


def test_every_name_has_the_prefix_or_is_the_process() -> None:
    text = Metrics().render().decode()
    names = [family.name for family in text_string_to_metric_families(text)]
    assert all(re.match(r"(millrace|process|python)_", name) for name in names), names
