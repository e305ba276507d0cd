"""The server's life: health at each stage, drain, the core's death, signals, ports."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from millrace.engine.config import EngineConfig
from millrace.engine.errors import EngineUnavailable, InvalidRequest
from millrace.engine.server.grpc_server import Endpoints, serve
from millrace.v1 import admin_pb2
from millrace.v1 import inference_pb2 as pb

CODE = grpc.StatusCode
INFERENCE = "millrace.v1.Inference"
FAKE_CORE = Path(__file__).parents[1] / "engine" / "fake_core.py"


def health(server: Any, service: str = INFERENCE) -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = health_pb2_grpc.HealthStub(server.channel).Check(request)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def page(server: Any, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{server.server.http_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def long_request(max_tokens: int = 4000, request_id: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id,
        prompt=pb.Prompt(text="x" * 50),
        sampling=pb.SamplingParams(seed=1),
        stopping=pb.Stopping(max_tokens=max_tokens),
    )


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code()


def wait_until(true: Any, within_s: float = 5.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, f"not within {within_s} s"
        time.sleep(0.01)


# ---------------------------------------------------------------- stages


def test_before_the_engine_is_ready_nothing_is_served_but_health(live_server: Any) -> None:
    with live_server() as server:
        assert health(server) == health(server, "") == "NOT_SERVING"
        assert code_of(server.inference.Generate(long_request())) is CODE.UNAVAILABLE
        assert page(server, "/readyz") == (503, "starting\n")
        assert page(server, "/healthz")[0] == 200
        server.start_engine()
        assert health(server) == health(server, "") == "SERVING"
        assert page(server, "/readyz") == (200, "serving\n")


def test_an_unknown_service_has_no_health(served: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health(served, "nobody")
    assert caught.value.code() is CODE.NOT_FOUND


def test_reflection_lists_the_services(served: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    ask = reflection_pb2.ServerReflectionRequest
    (answer,) = stub.ServerReflectionInfo(iter([ask(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {INFERENCE, "millrace.v1.Admin", "grpc.health.v1.Health"}
    (answer,) = stub.ServerReflectionInfo(iter([ask(file_containing_symbol=INFERENCE)]))
    assert answer.file_descriptor_response.file_descriptor_proto


def test_a_drain_lets_the_live_finish_and_refuses_the_new(live_server: Any) -> None:
    with live_server("--step-s", "0.005") as server:
        server.start_engine()
        live = server.inference.Generate(long_request(max_tokens=60))
        next(live)
        draining = server.admin.Drain.future(admin_pb2.DrainRequest(timeout_ms=20_000))
        wait_until(lambda: server.server.engine().status == "draining")
        assert health(server) == "NOT_SERVING"
        assert page(server, "/readyz") == (503, "draining\n")
        assert page(server, "/healthz")[0] == 200
        assert code_of(server.inference.Generate(long_request())) is CODE.UNAVAILABLE
        assert server.admin.GetLoad(admin_pb2.GetLoadRequest()).draining
        assert list(live)[-1].HasField("summary")
        assert draining.result().unfinished == 0


def test_what_outlives_the_drain_is_told_unavailable(live_server: Any) -> None:
    with live_server("--step-s", "0.005") as server:
        server.start_engine()
        lone = server.inference.Generate(long_request())
        submit = pb.ConnectRequest(submit=long_request(request_id="r"))
        open_end = iter([submit])
        shared = server.inference.Connect(open_end)
        next(lone), next(shared)
        left = server.admin.Drain(admin_pb2.DrainRequest(timeout_ms=50)).unfinished
        assert left == 2
        server.call(server.server.close(1.0))
        assert code_of(lone) is CODE.UNAVAILABLE
        failures = [r.failure for m in shared for r in m.results if r.HasField("failure")]
        assert [f.code for f in failures] == [CODE.UNAVAILABLE.value[0]]


def test_the_cores_death_is_told_to_everybody(live_server: Any) -> None:
    with live_server("--step-s", "0.002", "--die-at", "20") as server:
        server.start_engine()
        calls = [server.inference.Generate(long_request()) for _ in range(3)]
        assert [code_of(call) for call in calls] == [CODE.UNAVAILABLE] * 3
        wait_until(lambda: server.server.engine().status == "dead")
        assert code_of(server.inference.Generate(long_request())) is CODE.UNAVAILABLE
        assert page(server, "/healthz")[0] == 503 and page(server, "/readyz") == (503, "dead\n")


# ---------------------------------------------------------------- admin and metrics


def test_load_is_that_of_the_newest_step(served: Any) -> None:
    call = served.inference.Generate(long_request())
    next(call)
    load = served.admin.GetLoad(admin_pb2.GetLoadRequest())
    assert load.running == 1 and load.kv_blocks_total == 64 and load.steps > 0
    assert not load.draining
    call.cancel()


def test_flush_says_how_many_blocks_were_forgotten(served: Any) -> None:
    assert served.admin.FlushCache(admin_pb2.FlushCacheRequest()).blocks == 7


@pytest.mark.parametrize("timeout_ms", [0, -5])
def test_a_drain_without_time_is_refused_and_does_not_drain(served: Any, timeout_ms: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.admin.Drain(admin_pb2.DrainRequest(timeout_ms=timeout_ms))
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert served.server.engine().status == "serving"


def test_requests_and_calls_show_in_the_metrics(live_server: Any) -> None:
    with live_server() as server:
        server.start_engine()
        list(server.inference.Generate(long_request(max_tokens=5)))
        bad = long_request(max_tokens=0)
        assert code_of(server.inference.Generate(bad)) is CODE.INVALID_ARGUMENT
        text = page(server, "/metrics")[1]
    assert 'millrace_requests_total{outcome="length"} 1.0' in text
    assert "millrace_output_tokens_total 5.0" in text
    assert "millrace_time_to_first_token_seconds_count 1.0" in text
    assert 'millrace_grpc_calls_total{code="OK",method="Generate"} 1.0' in text
    assert 'millrace_grpc_calls_total{code="INVALID_ARGUMENT",method="Generate"} 1.0' in text


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(99), b"\xff"]
)
def test_what_is_not_http2_closes_its_own_connection_only(served: Any, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as connection:
        connection.sendall(garbage)
    assert health(served) == "SERVING"


# ---------------------------------------------------------------- serve


def config(model: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(**({"model": str(model), "port": 0, "http_port": 0} | settings))


def command(*options: str) -> tuple[str, ...]:
    return (sys.executable, "-P", str(FAKE_CORE), *options)


async def served_until(
    model: Path, on_ready: Any, *options: str, **settings: Any
) -> tuple[int, list[Endpoints]]:
    """Run `serve`; `on_ready(endpoints)` is a coroutine that runs beside it."""
    seen: list[Endpoints] = []
    tasks: list[asyncio.Task[None]] = []

    def ready(endpoints: Endpoints) -> None:
        seen.append(endpoints)
        tasks.append(asyncio.create_task(on_ready(endpoints)))

    code = await serve(config(model, **settings), ready, command(*options))
    await asyncio.gather(*tasks)
    return code, seen


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_leaves_with_zero(
    byte_model: Path, kind: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    got: list[pb.GenerateResponse] = []

    async def use(endpoints: Endpoints) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoints.port}") as channel:
            generate = channel.unary_stream(
                f"/{INFERENCE}/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            call = generate(long_request(max_tokens=40))
            got.append(await call.read())
            os.kill(os.getpid(), kind)
            while (response := await call.read()) is not grpc.aio.EOF:
                got.append(response)

    code, seen = asyncio.run(served_until(byte_model, use, "--step-s", "0.005", served_name="tiny"))
    assert code == 0 and got[-1].HasField("summary")
    ports = (seen[0].port, seen[0].http_port)
    line = "millrace: serving tiny on grpc://127.0.0.1:{}, metrics on http://127.0.0.1:{}/metrics\n"
    assert capsys.readouterr().out == line.format(*ports)


def test_a_second_signal_does_not_wait(byte_model: Path) -> None:
    codes: list[grpc.StatusCode] = []

    async def use(endpoints: Endpoints) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoints.port}") as channel:
            generate = channel.unary_stream(
                f"/{INFERENCE}/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            call = generate(long_request())
            await call.read()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            codes.append(caught.value.code())

    began_s = time.monotonic()
    options = ("--step-s", "0.005")
    code, _ = asyncio.run(served_until(byte_model, use, *options, drain_timeout_s=60.0))
    assert code == 0 and time.monotonic() - began_s < 20
    assert codes == [CODE.UNAVAILABLE]


def test_the_cores_death_ends_the_server_with_an_error(byte_model: Path) -> None:
    codes: list[grpc.StatusCode] = []

    async def use(endpoints: Endpoints) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{endpoints.port}") as channel:
            generate = channel.unary_stream(
                f"/{INFERENCE}/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in generate(long_request()):
                    pass
            codes.append(caught.value.code())

    code, _ = asyncio.run(served_until(byte_model, use, "--die-at", "5"))
    assert code != 0 and codes == [CODE.UNAVAILABLE]


def test_an_engine_that_cannot_start_says_why(byte_model: Path) -> None:
    with pytest.raises(EngineUnavailable, match="weights are gone"):
        asyncio.run(serve(config(byte_model), command=command("--fail", "weights are gone")))


@pytest.mark.parametrize("field", ["port", "http_port"])
def test_a_port_in_use_names_its_setting(byte_model: Path, field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {field: taken.getsockname()[1]}
        with pytest.raises(InvalidRequest) as caught:
            asyncio.run(serve(config(byte_model, **settings), command=command()))
    assert caught.value.field == field


def test_addresses_of_ip_version_6_are_bracketed() -> None:
    line = str(Endpoints("::1", 1, 2, "m"))
    assert line == "millrace: serving m on grpc://[::1]:1, metrics on http://[::1]:2/metrics"


def test_the_front_end_does_not_load_torch() -> None:
    """It would cost seconds and gigabytes for nothing: the core has it."""
    check = "import sys, millrace.engine.server.grpc_server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
