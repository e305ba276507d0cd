"""The load generator against a scripted server: loops, transports, and figures known beforehand."""

import asyncio
import json
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from millrace.perf.loadgen.__main__ import Load, Mode, main, run_load
from millrace.perf.loadgen.drive import Run, open_loop
from millrace.perf.loadgen.record import Record
from millrace.perf.loadgen.report import Spread, summarize
from millrace.perf.loadgen.tenants import (
    Tenant,
    assign,
    by_tenant,
    parse_tenants,
    tenant_lines,
)
from millrace.perf.loadgen.transport import GenerateSender
from millrace.perf.loadgen.workload import poisson_arrivals, random_ids, random_requests
from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceStub

MODES = list(Mode)


def load(target, mode=Mode.generate, requests=6, concurrency=3, rate=None, output_tokens=5):
    return Load(target, requests, concurrency, rate, mode, 7, output_tokens, seed=1)


def record(intended_s, sent_s, times, ended_s, usage=None):
    """A request that succeeded, one list of token times for each output."""
    tokens = [list(range(len(t))) for t in times]
    usage = usage or pb.Usage(prompt_tokens=10, output_tokens=sum(map(len, times)))
    made = Record("r", intended_s, sent_s, ended_s, token_times_s=times, token_ids=tokens)
    made.usage = usage
    return made


# ---------------------------------------------------------------- workload


def test_prompts_are_distinct_repeatable_and_differ_by_seed():
    ids = random_ids(128, 1000, [0, 1])
    assert len(set(ids)) == 128 and max(ids) < 1000 and min(ids) >= 0
    assert ids == random_ids(128, 1000, [0, 1]) != random_ids(128, 1000, [0, 2])
    assert len(random_ids(50, 10, [0])) == 50  # more than there are


def test_requests_are_greedy_and_of_a_fixed_length():
    first, second = random_requests(2, 4, 9, 1000, [3])
    assert first.request_id != second.request_id
    assert first.prompt.token_ids.ids != second.prompt.token_ids.ids
    assert first.sampling.HasField("temperature") and first.sampling.temperature == 0.0
    assert (first.stopping.max_tokens, first.stopping.ignore_eos) == (9, True)


def test_arrivals_are_a_poisson_process():
    """Gaps with the mean and, being exponential, a standard deviation that equals it."""
    arrivals = poisson_arrivals(20_000, rate=4.0, seed=5)
    gaps = np.diff([0.0, *arrivals])
    assert arrivals == poisson_arrivals(20_000, rate=4.0, seed=5)
    assert gaps.min() > 0
    # The standard error of the mean is 0.25 / sqrt(20000) = 0.0018; five of them.
    assert gaps.mean() == pytest.approx(0.25, abs=0.009)
    assert gaps.std() == pytest.approx(0.25, abs=0.02)


# ---------------------------------------------------------------- loops and transports


@pytest.mark.parametrize("mode", MODES)
def test_every_token_of_every_request_is_timed(serve_script, script, mode):
    run = asyncio.run(run_load(load(serve_script(script(token_s=0.01)), mode)))
    assert [r.status for r in run.records] == ["OK"] * 6
    assert all(r.token_ids == [[0, 1, 2, 3, 4]] for r in run.records)
    for made in run.records:
        assert made.intended_s <= made.sent_s < made.token_times_s[0][0] <= made.ended_s
        assert min(made.gaps_s) >= 0.0 and sum(made.gaps_s) >= 0.03


@pytest.mark.parametrize("mode", MODES)
def test_a_refusal_is_a_result_with_its_status(serve_script, script, mode):
    run = asyncio.run(run_load(load(serve_script(script(refuse_above=4)), mode)))
    assert {r.status for r in run.records} == {"RESOURCE_EXHAUSTED"}
    assert not any(r.ok for r in run.records)
    assert summarize(run).failures == {"RESOURCE_EXHAUSTED": 6}


@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_is_lost_is_a_failure(serve_script, script, mode):
    run = asyncio.run(run_load(load(serve_script(script(lose_tokens=1)), mode)))
    assert {r.status for r in run.records} == {"DATA_LOSS"}


def test_a_broken_stream_ends_all_of_its_requests(serve_script, script):
    target = serve_script(script(token_s=0.005, die_after=4))
    run = asyncio.run(asyncio.wait_for(run_load(load(target, Mode.connect)), 20))
    assert len(run.records) == 6
    assert {r.status for r in run.records} == {"UNAVAILABLE"}


def test_the_closed_loop_keeps_to_its_concurrency(serve_script, script):
    scripted = script(token_s=0.005)
    run = asyncio.run(run_load(load(serve_script(scripted), requests=10, concurrency=3)))
    assert scripted.peak == 3
    assert summarize(run).peak_concurrent == 3


def test_the_open_loop_waits_for_nobody(serve_script, script):
    """Ten arrivals within moments, of requests that take much longer, are all under way at once."""
    scripted = script(token_s=0.1)
    run = asyncio.run(run_load(load(serve_script(scripted), requests=10, rate=500.0)))
    assert scripted.peak == 10
    assert summarize(run).successful == 10


def test_the_open_loop_counts_from_the_intended_time(serve_script, script):
    """A client that is held up for 0.3 s sends late; the latency must not hide that."""
    target = serve_script(script())
    requests = random_requests(2, 4, 2, 1000, [0])

    async def held_up() -> Run:
        async with grpc.aio.insecure_channel(target) as channel:
            inference = InferenceStub(channel)
            await inference.GetModel(pb.GetModelRequest(), wait_for_ready=True)
            asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)
            return await open_loop(GenerateSender(inference), requests, [0.0, 0.1])

    late = asyncio.run(held_up()).records[1]
    assert late.sent_s - late.intended_s > 0.15
    assert late.ttft_s is not None and late.ttft_s > 0.15


# ---------------------------------------------------------------- tenants


def test_tenants_send_by_their_shares_well_mixed():
    requests = random_requests(8, 4, 2, 1000, [0])
    assign(requests, parse_tenants("chat:3, batch:1:5"))
    assert [r.tenant for r in requests].count("chat") == 6
    assert {r.tenant for r in requests[:4]} == {r.tenant for r in requests[4:]} == {"chat", "batch"}
    assert all(r.HasField("priority") == (r.tenant == "batch") for r in requests)
    assert {r.priority for r in requests if r.tenant == "batch"} == {5}


def test_a_priority_is_of_all_that_give_none():
    assert [t.priority for t in parse_tenants("a:1,b:1:0", 7)] == [7, 0]
    assert parse_tenants(None, 7) == (Tenant("", 1, 7),)
    assert parse_tenants(None) == ()


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:0", "a:x", "a:1:2:3", "a:-1", "a:1,a:2"])
def test_what_names_no_tenants_is_refused(text):
    with pytest.raises(ValueError, match=r"form|share|once"):
        parse_tenants(text)


def test_each_tenant_has_its_own_figures():
    slow, quick = record(0.0, 0.0, [[4.0, 5.0]], 5.0), record(0.0, 0.0, [[1.0, 2.0]], 2.0)
    slow.tenant, quick.tenant = "slow", "quick"
    failed = Record("bad", 0.0, 0.0, 1.0, status="CANCELLED", tenant="slow")
    found = by_tenant(Run(0.0, [slow, quick, failed, record(0.0, 0.0, [[1.0]], 9.0)]))
    assert {name: s.ttft.median for name, s in found.items()} == {"slow": 4000.0, "quick": 1000.0}
    assert found["quick"].output_tokens_per_s == 1.0  # of its own two seconds
    lines = tenant_lines(found)
    assert lines[0].startswith("tenant slow: 1 requests, 0.4 tokens/s, TTFT median 4000 ms")
    assert lines[0].endswith("1 failed") and "failed" not in lines[1]


@pytest.mark.parametrize("mode", MODES)
def test_the_server_hears_who_sends(serve_script, script, mode):
    scripted = script()
    asked = replace(load(serve_script(scripted), mode), tenants=parse_tenants("a:2,b:1", 3))
    run = asyncio.run(run_load(asked))
    assert sorted(scripted.senders) == [("a", 3)] * 4 + [("b", 3)] * 2
    assert {name: share.successful for name, share in by_tenant(run).items()} == {"a": 4, "b": 2}


# ---------------------------------------------------------------- figures


def test_latencies_are_as_defined():
    made = record(1.0, 1.5, [[2.0, 2.1, 2.4], [2.2, 2.3, 2.5]], 3.0)
    assert made.ttft_s == pytest.approx(1.0)
    assert made.e2el_s == pytest.approx(2.0)
    assert made.gaps_s == pytest.approx([0.1, 0.3, 0.1, 0.2])
    assert made.tpot_s == pytest.approx([0.2, 0.15])


def test_tokens_of_one_message_share_its_time():
    made = Record("r", time.perf_counter())
    made.take(pb.GenerateResponse(outputs=[pb.OutputDelta(index=0, token_ids=[1, 2, 3])]))
    assert made.gaps_s == [0.0, 0.0]
    assert made.tpot_s == [0.0]


def test_a_single_token_has_no_time_per_token():
    made = record(0.0, 0.0, [[1.0]], 1.0)
    assert made.gaps_s == [] and made.tpot_s == []
    assert Spread.of(made.gaps_s) == Spread(0.0, 0.0, 0.0, 0.0)


def test_a_summary_adds_up():
    bad = Record("bad", 0.0, 0.0, 1.0, status="CANCELLED")
    first = record(0.0, 0.0, [[1.0, 1.5, 3.5]], 4.0)
    second = record(1.0, 1.0, [[2.0, 3.0]], 5.0)
    summary = summarize(Run(0.0, [first, second, bad]))
    assert (summary.successful, summary.failures) == (2, {"CANCELLED": 1})
    assert (summary.input_tokens, summary.output_tokens) == (20, 5)
    assert summary.duration_s == 5.0
    assert summary.output_tokens_per_s == pytest.approx(1.0)
    assert summary.peak_output_tokens_per_s == 2  # those at 1.0 and 1.5, or at 3.0 and 3.5
    assert summary.peak_concurrent == 2
    assert summary.ttft.mean == pytest.approx(1000.0)
    assert summary.itl.median == pytest.approx(1000.0)  # of 500, 1000 and 2000 ms
    assert summary.tpot.mean == pytest.approx(1125.0)  # of 1250 and 1000 ms
    assert summary.e2el.p99 == pytest.approx(4000.0)


def test_a_client_that_cannot_keep_up_is_said_so():
    prompt = summarize(Run(0.0, [record(0.0, 0.0005, [[0.1]], 0.2)]))
    late = summarize(Run(0.0, [record(0.0, 0.05, [[0.1]], 0.2)]))
    assert prompt.client_kept_up and not late.client_kept_up
    assert any("could not send in time" in line for line in late.lines())
    assert not any("could not send in time" in line for line in prompt.lines())


def test_the_table_has_the_usual_names():
    text = "\n".join(summarize(Run(0.0, [record(0.0, 0.0, [[1.0, 2.0]], 2.0)])).lines())
    for name in ("Successful requests", "Total generated tokens", "Output token throughput"):
        assert f"{name}" in text
    for metric in ("TTFT", "TPOT", "ITL", "E2EL"):
        for kind in ("Mean", "Median", "P99"):
            assert f"{kind} {metric} (ms):" in text


def test_an_empty_run_has_figures():
    assert summarize(Run(0.0, [])).output_tokens_per_s == 0.0


def test_the_program_writes_every_request(serve_script, script, tmp_path):
    app = Typer()
    app.command()(main)
    file = tmp_path / "run.json"
    options = ["--requests", "3", "--output-tokens", "2", "--json", str(file)]
    result = CliRunner().invoke(app, ["--target", serve_script(script()), *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["requests"]
    assert [len(row["token_times_s"][0]) for row in rows] == [2, 2, 2]
    assert all(row["status"] == "OK" and row["intended_s"] >= 0 for row in rows)


def test_the_program_fails_if_a_request_does(serve_script, script):
    app = Typer()
    app.command()(main)
    arguments = ["--target", serve_script(script(refuse_above=1)), "--requests", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 1
