"""A scripted server on a real socket: so many tokens a request, one every so many seconds.

With threads, not asyncio: the clients under test have the only event loop of the process.
"""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

VOCAB_SIZE = 1000
MAX_STREAMS = 64
NEVER = 10**9


class Script(InferenceServicer):
    """Gives each request the tokens 0, 1, 2, ... up to its max_tokens, in each of its n outputs."""

    def __init__(self, token_s=0.0, refuse_above=NEVER, lose_tokens=0, die_after=NEVER):
        self.token_s = token_s
        self.refuse_above = refuse_above  # max_tokens
        self.lose_tokens = lose_tokens  # of those that the usage counts
        self.die_after = die_after  # messages of a Connect stream
        self.prompts = []  # token ids, as they came
        self.senders = []  # (tenant, priority or None), likewise
        self.live = self.peak = 0
        self._lock = threading.Lock()

    def GetModel(self, request, context):
        return pb.GetModelResponse(name="script", vocab_size=VOCAB_SIZE, dtype="none")

    def Generate(self, request, context):
        with self._lock:
            self.live += 1
            self.peak = max(self.peak, self.live)
        try:
            if request.stopping.max_tokens > self.refuse_above:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too long")
            yield from self.responses(request)
        finally:
            with self._lock:
                self.live -= 1

    def Connect(self, requests, context):
        results = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(requests, results), daemon=True).start()
        for count, result in enumerate(iter(results.get, None)):
            if count == self.die_after:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield pb.ConnectResponse(results=[result])

    def _read(self, requests, results):
        with ThreadPoolExecutor(MAX_STREAMS) as answering:
            try:
                for message in requests:
                    answering.submit(self._answer, message.submit, results)
            except grpc.RpcError:
                return  # the client has gone
        results.put(None)

    def _answer(self, request, results):
        if request.stopping.max_tokens > self.refuse_above:
            response = pb.GenerateResponse(request_id=request.request_id)
            failure = pb.Failure(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
            results.put(pb.ConnectResult(response=response, failure=failure))
            return
        for response in self.responses(request):
            results.put(pb.ConnectResult(response=response))

    def responses(self, request):
        self.prompts.append(tuple(request.prompt.token_ids.ids))
        priority = request.priority if request.HasField("priority") else None
        self.senders.append((request.tenant, priority))
        count, outputs = request.stopping.max_tokens, range(request.sampling.n or 1)
        for token in range(count - self.lose_tokens):
            time.sleep(self.token_s)
            deltas = [pb.OutputDelta(index=i, token_ids=[token], text="x") for i in outputs]
            yield pb.GenerateResponse(request_id=request.request_id, outputs=deltas)
        prompt_tokens = len(request.prompt.token_ids.ids) or 1
        usage = pb.Usage(prompt_tokens=prompt_tokens, output_tokens=count * len(outputs))
        summary = pb.Summary(usage=usage)
        yield pb.GenerateResponse(request_id=request.request_id, summary=summary)


@pytest.fixture(autouse=True)
def _one_event_loop(one_event_loop):
    """For every test here."""


@pytest.fixture
def script():
    """The class of scripts."""
    return Script


@pytest.fixture
def serve_script():
    """serve(script) -> "host:port"."""
    servers = []

    def serve(script):
        server = grpc.server(ThreadPoolExecutor(MAX_STREAMS))
        add_InferenceServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(None).wait()
