"""The benchmark, the demo and what they stand on, against a scripted server."""

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.errors import EngineUnavailable, MillraceError
from millrace.perf import bench, bench_report, demo
from millrace.perf.cpu_time import cpu_seconds_of_tree
from millrace.perf.demo_requests import demo_cases
from millrace.perf.environment import environment
from millrace.perf.loadgen.drive import Run
from millrace.perf.loadgen.record import Record
from millrace.perf.loadgen.report import summarize
from millrace.perf.loadgen.tenants import parse_tenants
from millrace.perf.peers.process import PeerProcess
from millrace.perf.server_process import ServerProcess, metric
from millrace.v1 import inference_pb2 as pb

PLAN = bench.Plan((1, 4), repeats=2, prompt_tokens=5, output_tokens=3, peers=(), seed=0)


def summary_of(rate):
    """A run of 100 tokens at so many a second."""
    made = Record("r", 0.0, 0.0, 100 / rate, token_times_s=[[1.0] * 100], token_ids=[[1] * 100])
    made.usage = pb.Usage(prompt_tokens=1, output_tokens=100)
    return summarize(Run(0.0, [made]))


def test_the_last_line_is_json_with_every_run(serve_script, script, capsys, tmp_path):
    file = tmp_path / "bench.json"
    bench.run(PLAN, EngineConfig(), serve_script(script()), file)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    result = json.loads(last)
    assert result == json.loads(file.read_text())
    assert [level["streams"] for level in result["levels"]] == [1, 4]
    for level in result["levels"]:
        assert len(level["runs"]) == 2
        assert all(run["output_tokens"] == 3 * level["streams"] for run in level["runs"])
        assert level["overhead"] is None  # of a server that is somebody else's
    assert result["server"]["name"] == "script"
    assert result["environment"]["seed"] == 0


def test_prompts_are_new_in_every_repetition(serve_script, script):
    """Else the prefix cache would do the work."""
    scripted = script()
    bench.run(PLAN, EngineConfig(), serve_script(scripted), None)
    assert len(scripted.prompts) == 4 + 2 * (1 + 4)
    assert len(set(scripted.prompts)) == len(scripted.prompts)


def test_tenants_are_reported_apart(serve_script, script, capsys):
    plan = replace(PLAN, levels=(4,), tenants=parse_tenants("chat:3,batch:1"))
    bench.run(plan, EngineConfig(), serve_script(script()), None)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    (level,) = json.loads(last)["levels"]
    assert [{name: t["successful"] for name, t in run.items()} for run in level["tenants"]] == [
        {"chat": 3, "batch": 1}
    ] * 2
    assert any(line.startswith("4 streams, repetition 2, tenant batch: 1 req") for line in lines)


def test_a_failed_request_leaves_no_figures(serve_script, script, capsys):
    with pytest.raises(MillraceError, match="RESOURCE_EXHAUSTED"):
        bench.run(PLAN, EngineConfig(), serve_script(script(refuse_above=2)), None)
    assert capsys.readouterr().out == ""


def test_ratios_are_of_medians():
    one = bench_report.Level(1, [summary_of(10), summary_of(11), summary_of(90)])
    many = bench_report.Level(16, [summary_of(44), summary_of(1), summary_of(55)])
    many.cpu = [bench_report.CpuUse(1.0, 0.5, 10.0), bench.CpuUse(1.0, 1.0, 10.0)]
    peers = [
        bench_report.PeerLevel("transformers", 16, [20.0, 22.0, 100.0]),
        bench_report.PeerLevel("vllm-fp32", 1, [22.0, 22.0, 1.0]),
        bench_report.PeerLevel("vllm-fp32", 8, [1.0]),
    ]
    result = bench_report.result_of([one, many], peers)
    assert result["levels"][1]["scaling"] == pytest.approx(4.0)
    assert result["levels"][1]["overhead"] == pytest.approx(0.175)
    ratios = [peer["ratio"] for peer in result["peers"]]
    assert ratios[:2] == pytest.approx([2.0, 0.5]) and ratios[2] is None
    lines = "\n".join(bench_report.findings(result))
    assert "4.00 x tokens/s" in lines and "17.5%" in lines and "2.00 x as fast" in lines


ECHO = """
import json, sys
print('{"version": "0"}', flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    made = len(asked["prompts"]) * asked["output_tokens"]
    print(json.dumps({"output_tokens": made, "seconds": 0.5}), flush=True)
"""


def test_peers_take_turns_with_the_prompts_of_as_many_streams(
    serve_script, script, capsys, monkeypatch, tmp_path
):
    command, file = [sys.executable, "-c", ECHO], tmp_path / "bench.json"
    monkeypatch.setattr(bench, "_start_peer", lambda *_: PeerProcess(command))
    plan = replace(PLAN, peers=("vllm", "transformers"), peer_streams=(1, 4))
    bench.run(plan, EngineConfig(), serve_script(script()), file)
    result = json.loads(file.read_text())
    assert [(p["name"], p["streams"], p["runs"]) for p in result["peers"]] == [
        (name, streams, [streams * 6.0] * 2) for name in plan.peers for streams in (1, 4)
    ]
    assert result["peer_versions"]["vllm"] == {"version": "0"}
    assert "vllm at 4 streams: 24.0 tokens/s; Millrace is " in capsys.readouterr().out


def test_a_peer_that_does_not_start_is_named(serve_script, script, monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit('no such GPU')"]
    monkeypatch.setattr(bench, "_start_peer", lambda *_: PeerProcess(command))
    with pytest.raises(MillraceError, match="vllm does not start: exit code 1: no such GPU"):
        bench.run(replace(PLAN, peers=("vllm",)), EngineConfig(), serve_script(script()), None)


def wait_for(true, within_s=30.0):
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, f"not within {within_s} s"
        time.sleep(0.02)


def test_cpu_time_counts_children_and_leaves_others_out():
    busy = (
        "import time; e = time.process_time() + 0.3\nwhile time.process_time() < e: pass\ninput()"
    )
    parent = (
        f"import subprocess, sys; p = subprocess.PIPE\n"
        f"child = subprocess.Popen([sys.executable, '-c', {busy!r}], stdin=p)\n"
        "print('x', flush=True)\ninput()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", parent], stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None and process.stdout.read(1) == b"x"
            wait_for(lambda: sum(cpu_seconds_of_tree(process.pid).values()) >= 0.3)
            found = cpu_seconds_of_tree(process.pid)
            assert len(found) == 2 and process.pid in found and os.getpid() not in found
        finally:
            process.kill()


def test_the_environment_is_data():
    found = environment(seed=3)
    assert json.loads(json.dumps(found)) == found
    assert found["seed"] == 3 and found["cpus"] >= 1 and found["millrace"]


def test_a_metric_is_read_by_its_whole_name():
    page = "# HELP a_sum x\na_sum_total 4.0\na_sum 2.5\n"
    assert metric(page, "a_sum") == 2.5
    assert metric(page, "b") == 0.0


def test_a_server_that_does_not_start_says_why():
    server = ServerProcess(["--model", "/no"])
    with pytest.raises(EngineUnavailable, match="neither a folder"):
        server.__enter__()


# ---------------------------------------------------------------- the demo


def test_the_demo_shows_what_it_promises():
    cases = demo_cases()
    assert 24 <= len(cases) <= 48
    requests = [case.request for case in cases]
    assert len({len(r.prompt.text) for r in requests}) > 8
    assert any(r.prompt.HasField("messages") for r in requests)
    assert any(r.stopping.stop for r in requests)
    assert any(r.sampling.n == 2 and r.sampling.HasField("seed") for r in requests)
    assert any(r.sampling.HasField("top_p") for r in requests)
    assert any(case.cancel_after for case in cases)
    assert any(case.status == "INVALID_ARGUMENT" and case.field for case in cases)
    seeded = [r.SerializeToString() for r in requests if r.sampling.HasField("seed")]
    assert len(set(seeded)) < len(seeded)


def test_the_demo_fails_if_a_bad_request_is_served(serve_script, script, capsys):
    """The scripted server refuses nothing: that, and only that, is wrong."""
    problems = asyncio.run(demo._demonstrate(serve_script(script(token_s=0.002))))
    assert len(problems) == 1 and problems[0].startswith("refused: temperature -1 ended with OK")
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "cancelled by us: cancelled" in printed
    assert "'seed 7 again' gave the same tokens as 'seed 7'" in printed


def test_the_demo_fails_if_requests_do(serve_script, script):
    problems = asyncio.run(demo._demonstrate(serve_script(script(refuse_above=0))))
    assert len(problems) == len(demo_cases())
    assert all("RESOURCE_EXHAUSTED" in problem for problem in problems)
