"""The programs in examples/ and those of README.md, run as they stand against a real server."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format

from millrace.client import Client
from millrace.perf.server_process import ServerProcess
from millrace.v1 import admin_pb2, inference_pb2

pytestmark = [pytest.mark.server, pytest.mark.model]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT_TARGET = "localhost:50051"
TIMEOUT_S = 300.0  # of a program that would otherwise hang; a busy machine is slow, not wrong


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """`millrace serve` with the built-in model, for all tests of this file."""
    with ServerProcess(["--max-running", "8", "--policy", "fair_share"]) as server:
        yield server


def run(code: list[str]) -> str:
    """Run Python on `code`, from outside of the repository; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", *code], capture_output=True, text=True, timeout=TIMEOUT_S, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(name: str, server: ServerProcess) -> str:
    return run([str(ROOT / "examples" / f"{name}.py"), server.target])


def snippet(heading: str, language: str) -> str:
    """The first block of a language after a heading of README.md."""
    section = README.partition(f"## {heading}\n")[2]
    block = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert block is not None, f"README.md has no {language} under {heading!r}"
    return block[1]


def test_stream_prints_the_whole_answer_and_its_usage(server: ServerProcess) -> None:
    text, _, usage = example("stream", server).rpartition("\n\n")
    assert len(text.split()) > 10
    assert usage.startswith("ended by length; 8 tokens in, 40 out; the first after ")


def test_batch_answers_every_prompt(server: ServerProcess) -> None:
    lines = example("batch", server).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("France", "Japan", "Peru", "Kenya", "Norway", "Egypt", "Canada", "India")
    ]
    assert "Paris" in lines[0]


def test_cancel_stops_early(server: ServerProcess) -> None:
    last = example("cancel", server).splitlines()[-1]
    tokens = re.match(r"cancelled after (\d+) of 1000 tokens; \d+ running, \d+ of", last)
    assert tokens is not None, last
    assert int(tokens[1]) < 200


def test_chat_reuses_the_history_of_the_conversation(server: ServerProcess) -> None:
    cached = re.findall(r"\((\d+) of (\d+) prompt tokens were cached\)", example("chat", server))
    assert len(cached) == 2
    hits, prompt = map(int, cached[1])
    assert 0 < hits < prompt


def test_deadline_keeps_what_came_in_time(server: ServerProcess) -> None:
    last = example("deadline", server).splitlines()[-1]
    tokens = re.fullmatch(r"the request's deadline has passed; (\d+) tokens came in time", last)
    assert tokens is not None, last
    assert int(tokens[1]) > 0


def test_a_small_tenant_does_not_wait_for_the_greedy_one(server: ServerProcess) -> None:
    """Eight of sixteen run; by arrival the question would be the last."""
    line = example("tenants", server).strip()
    answer = re.fullmatch(r"desk: '(.*)' after (\d+) of batch's 16 answers", line)
    assert answer is not None, line
    assert "Paris" in answer[1] and int(answer[2]) <= 8


def test_the_readmes_client_runs(server: ServerProcess) -> None:
    code = snippet("A client in ten lines", "python")
    assert DEFAULT_TARGET in code
    assert len(code.splitlines()) == 10
    assert "output_tokens: 40" in run(["-c", code.replace(DEFAULT_TARGET, server.target)])


def test_the_readmes_grpcurl_call_is_a_request(server: ServerProcess) -> None:
    call = re.search(r"grpcurl -plaintext -d '(.*)' \\\n +(\S+) (\S+)/(\w+)\n", README)
    assert call is not None
    data, target, service, method = call.groups()
    assert target == DEFAULT_TARGET
    found = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    assert (found.full_name, found.methods_by_name[method].name) == (service, "Generate")
    request = json_format.Parse(data, inference_pb2.GenerateRequest())
    with Client(server.target) as client:
        responses = list(client.inference.Generate(request, timeout=TIMEOUT_S))
    assert responses[-1].summary.usage.output_tokens == 16


def test_nothing_is_left_behind_when_all_examples_are_done(server: ServerProcess) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    with Client(server.target) as client:
        while (load := client.admin.GetLoad(admin_pb2.GetLoadRequest())).running:
            assert time.monotonic() < end_s, "a request runs on"
            time.sleep(0.05)
    assert (load.waiting, load.kv_blocks_used) == (0, 0)
