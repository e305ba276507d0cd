"""The real server as a process of its own, with the built-in model: started, used, ended."""

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from millrace.client import CallFailed, Client
from millrace.v1 import admin_pb2
from millrace.v1 import inference_pb2 as pb

pytestmark = [pytest.mark.server, pytest.mark.model]

START_TIMEOUT_S = 300.0
READY = re.compile(r"millrace: serving (\S+) on grpc://(\S+), metrics on (http://\S+/metrics)")
PROMPT = "The capital of France is"


@dataclass
class ServerProcess:
    """A `millrace serve` that has said it is ready."""

    process: subprocess.Popen[str]
    target: str
    metrics_url: str

    def ended(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)


def start(*flags: str) -> ServerProcess:
    command = [sys.executable, "-m", "millrace.engine.cli", "serve"]
    ports = ["--port", "0", "--http-port", "0"]
    process = subprocess.Popen([*command, *ports, *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    end_s = time.monotonic() + START_TIMEOUT_S
    for line in process.stdout:  # ends if the process does
        if found := READY.match(line):
            return ServerProcess(process, found[2], found[3])
        assert time.monotonic() < end_s, "not ready in time"
    raise AssertionError(f"the server ended with {process.wait()} before it was ready")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = start("--policy", "deadline", "--tenant-weights", "acme=2")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def wait_idle(client: Client, within_s: float = 10.0) -> None:
    end_s = time.monotonic() + within_s
    while (load := client.admin.GetLoad(admin_pb2.GetLoadRequest())).running + load.waiting:
        assert time.monotonic() < end_s, f"still busy: {load}"
        time.sleep(0.02)


def test_greedy_text_is_the_same_alone_and_among_others(client: Client) -> None:
    alone = client.generate(PROMPT, temperature=0, max_tokens=12).read()
    assert "Paris" in alone
    connection = client.connect()
    ids = [connection.submit(PROMPT, temperature=0, max_tokens=12) for _ in range(8)]
    connection.done()
    texts = dict.fromkeys(ids, "")
    for result in connection:
        assert not result.HasField("failure"), result.failure
        for output in result.response.outputs:
            texts[result.response.request_id] += output.text
    assert set(texts.values()) == {alone}


def test_a_seed_gives_the_same_sample_again(client: Client) -> None:
    first, second = (client.generate(PROMPT, seed=7, max_tokens=12).read() for _ in range(2))
    assert first == second != ""


def test_a_chat_is_answered(client: Client) -> None:
    stream = client.chat([("user", "Say hello.")], temperature=0, max_tokens=8)
    assert stream.read() and stream.answer.finish_reason in ("stop", "length")


def test_text_survives_tokenize_and_detokenize(client: Client) -> None:
    text = "naïve 漢字 🙂"
    prompt = pb.Prompt(text=text)
    tokens = client.inference.Tokenize(pb.TokenizeRequest(prompt=prompt, add_special=False)).tokens
    ids = [token.id for token in tokens]
    assert client.inference.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == text


def test_likelier_text_scores_higher(client: Client) -> None:
    def score(text: str) -> float:
        request = pb.ScoreRequest(prompt=pb.Prompt(text=f"{PROMPT} {text}"))
        return client.inference.Score(request).total_logprob

    assert score("Paris") > score("banana")


def test_a_cancelled_stream_frees_what_it_held(client: Client) -> None:
    for _ in client.generate(PROMPT, max_tokens=2000, ignore_eos=True):
        break
    wait_idle(client)
    load = client.admin.GetLoad(admin_pb2.GetLoadRequest())
    assert load.kv_blocks_used == 0


def test_bad_input_leaves_the_server_alive(client: Client) -> None:
    vocab_size = client.inference.GetModel(pb.GetModelRequest()).vocab_size
    for options in ({"temperature": float("nan")}, {"top_p": 0.0}, {"stop": [""] * 10_000}):
        with pytest.raises(CallFailed) as caught:
            client.generate(PROMPT, **options).read()  # type: ignore[arg-type]
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(CallFailed):
        client.generate([vocab_size]).read()
    assert client.generate(PROMPT, max_tokens=1).read() is not None


def cached_tokens(client: Client, prompt: list[int], **options: Any) -> int:
    stream = client.generate(prompt, max_tokens=1, temperature=0, **options)
    stream.read()
    assert stream.answer.summary is not None
    return stream.answer.summary.usage.cached_tokens


def test_a_tenant_finds_its_own_prompts_cached_and_never_anothers(client: Client) -> None:
    prompt = list(range(1000, 1040))
    assert cached_tokens(client, prompt, tenant="acme") == 0
    assert cached_tokens(client, prompt, tenant="other") == 0
    assert cached_tokens(client, prompt) == 0
    for tenant in ("acme", "other", ""):
        assert cached_tokens(client, prompt, tenant=tenant) == 39  # all but the last


def test_what_was_scored_is_cached_for_its_tenant_alone(client: Client) -> None:
    ids = list(range(2000, 2040))
    score = pb.ScoreRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)), tenant="acme")
    client.inference.Score(score)
    assert cached_tokens(client, ids) == 0
    assert cached_tokens(client, ids, tenant="acme") == 39


@pytest.mark.parametrize("kind", ["Generate", "Connect"])
def test_a_calls_metadata_names_the_tenant(client: Client, kind: str) -> None:
    ids = list(range(3000, 3040)) if kind == "Generate" else list(range(4000, 4040))
    request = pb.GenerateRequest(
        request_id="r",
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)),
        stopping=pb.Stopping(max_tokens=1),
    )
    metadata = (("x-millrace-tenant", "acme"),)
    if kind == "Generate":
        list(client.inference.Generate(request, metadata=metadata))
    else:
        list(client.inference.Connect(iter([pb.ConnectRequest(submit=request)]), metadata=metadata))
    assert cached_tokens(client, ids, tenant="other") == 0
    assert cached_tokens(client, ids, tenant="acme") == 39


def refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), dict(error.trailing_metadata())["millrace-field"]


def test_a_tenant_or_class_that_cannot_be_is_refused_by_name(client: Client) -> None:
    def call(*tenants: str, **fields: Any) -> Callable[[], Any]:
        request = pb.GenerateRequest(prompt=pb.Prompt(text="a"), **fields)
        metadata = tuple(("x-millrace-tenant", tenant) for tenant in tenants)
        return lambda: list(client.inference.Generate(request, metadata=metadata))

    bad = grpc.StatusCode.INVALID_ARGUMENT
    assert refusal(call(priority=10)) == (bad, "priority")
    assert refusal(call(tenant="two words")) == (bad, "tenant")
    assert refusal(call("two words")) == (bad, "tenant")
    assert refusal(call("acme", tenant="other")) == (bad, "tenant")
    assert refusal(call("acme", "acme")) == (bad, "x-millrace-tenant")


def test_the_metrics_have_counted(server: ServerProcess, client: Client) -> None:
    """What needs memory to run out is fed to Metrics in test_metrics.py; here it stays at 0."""
    client.generate(PROMPT, max_tokens=2, ignore_eos=True, tenant="acme", priority=4).read()
    client.generate(PROMPT, max_tokens=2, ignore_eos=True, tenant="nobody-in-particular").read()
    client.generate(PROMPT * 2, max_tokens=8, ignore_eos=True).read()  # steps enough for a model
    for options in ({"timeout_ms": 2000}, {"priority": -1}):
        with pytest.raises(CallFailed):
            client.generate([5] * 8000, max_tokens=2, **options).read()  # type: ignore[arg-type]
    page = served_metrics(server)
    assert page['millrace_requests_total{outcome="length"}'] >= 3
    assert page["millrace_kv_blocks_total"] > 0
    assert page['millrace_queue_seconds_count{priority="4"}'] == 1
    assert page['millrace_tenant_tokens_total{kind="output",tenant="acme"}'] >= 2
    assert page['millrace_tenant_tokens_total{kind="output",tenant="other"}'] >= 2
    assert page['millrace_refused_total{reason="invalid"}'] >= 1
    assert page["millrace_shed_total"] >= 1
    assert page["millrace_prefix_query_tokens_total"] > page["millrace_prefix_hit_tokens_total"] > 0
    assert page["millrace_prefix_evicted_blocks_total"] == page["millrace_preemptions_total"] == 0


def served_metrics(server: ServerProcess) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    rows = (line.rpartition(" ") for line in lines if line.startswith("millrace_"))
    return {name: float(value) for name, _, value in rows}


def test_sigterm_lets_the_live_finish_and_exits_with_zero() -> None:
    server = start()
    with Client(server.target) as client:
        stream = client.generate(PROMPT, max_tokens=30, ignore_eos=True)
        texts = iter(stream)
        next(texts)
        server.process.send_signal(signal.SIGTERM)
        list(texts)
    assert stream.answer.summary is not None
    assert stream.answer.summary.usage.output_tokens == 30
    assert server.ended(30) == 0


def test_a_killed_server_breaks_its_streams_and_leaves_no_core_behind() -> None:
    server = start()
    children = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert children
    with Client(server.target) as client:
        texts = iter(client.generate(PROMPT, max_tokens=2000, ignore_eos=True))
        next(texts)
        server.process.kill()
        with pytest.raises(CallFailed) as caught:
            list(texts)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    server.ended(10)
    end_s = time.monotonic() + 10
    while any(is_running(int(pid)) for pid in children):
        assert time.monotonic() < end_s, "the core outlived its server"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
