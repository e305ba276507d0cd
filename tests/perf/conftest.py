"""A scripted server on a real socket: so many tokens for each request, one every so many seconds."""

import asyncio
import threading

import grpc
import pytest

from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

VOCAB_SIZE = 1000


class Script(InferenceServicer):
    """Gives each request the tokens 0, 1, 2, ... up to its max_tokens, for each of its n outputs."""

    def __init__(self, token_s=0.0, refuse_above=10**9, lose_tokens=0, die_after=10**9):
        self.token_s = token_s
        self.refuse_above = refuse_above  # max_tokens
        self.lose_tokens = lose_tokens  # of those that the usage counts
        self.die_after = die_after  # messages of a Connect stream
        self.live = self.peak = 0

    async def GetModel(self, request, context):
        return pb.GetModelResponse(name="script", vocab_size=VOCAB_SIZE, dtype="none")

    async def Generate(self, request, context):
        self.live += 1
        self.peak = max(self.peak, self.live)
        try:
            if request.stopping.max_tokens > self.refuse_above:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too long")
            async for response in self.responses(request):
                yield response
        finally:
            self.live -= 1

    async def Connect(self, requests, context):
        queue, streams = asyncio.Queue(), set()

        async def answer(request):
            if request.stopping.max_tokens > self.refuse_above:
                response = pb.GenerateResponse(request_id=request.request_id)
                failure = pb.Failure(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
                return await queue.put(pb.ConnectResult(response=response, failure=failure))
            async for response in self.responses(request):
                await queue.put(pb.ConnectResult(response=response))

        async def read():
            async for message in requests:
                streams.add(asyncio.create_task(answer(message.submit)))
            await asyncio.gather(*streams)
            await queue.put(None)

        reading, sent = asyncio.create_task(read()), 0
        while (result := await queue.get()) is not None:
            if sent == self.die_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield pb.ConnectResponse(results=[result])
            sent += 1
        await reading

    async def responses(self, request):
        count, outputs = request.stopping.max_tokens, range(request.sampling.n or 1)
        for token in range(count - self.lose_tokens):
            await asyncio.sleep(self.token_s)
            deltas = [pb.OutputDelta(index=i, token_ids=[token], text="x") for i in outputs]
            yield pb.GenerateResponse(request_id=request.request_id, outputs=deltas)
        prompt_tokens = len(request.prompt.token_ids.ids) or 1
        usage = pb.Usage(prompt_tokens=prompt_tokens, output_tokens=count * len(outputs))
        summary = pb.Summary(usage=usage)
        yield pb.GenerateResponse(request_id=request.request_id, summary=summary)


@pytest.fixture
def serve_script():
    """serve(script) -> "host:port", in a thread of its own so that a slow client is the client's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    servers = []

    async def start(script):
        server = grpc.aio.server()
        add_InferenceServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    async def stop():
        await asyncio.gather(*(server.stop(0) for server in servers))

    yield lambda script: asyncio.run_coroutine_threadsafe(start(script), loop).result(10)
    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def script():
    """The class of scripts."""
    return Script
