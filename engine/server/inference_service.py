"""InferenceService (1 of 8): gRPC calls in, the engine's outputs out.

Each call is a few lines: convert the message, submit to the engine, write what comes back. Errors
are raised and become statuses in interceptor.py; Connect's own life is in connection.py.

After it: engine/async_engine.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Set
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from grpc.aio import ServicerContext

from millrace.engine.async_engine import AsyncEngine
from millrace.engine.core.messages import FinishReason, TokenLogprobs
from millrace.engine.errors import InvalidRequest
from millrace.engine.input import GenerationRequest
from millrace.engine.outbox import Outbox, RequestOutput
from millrace.engine.server import convert
from millrace.engine.server.caller import caller_of
from millrace.engine.server.connection import Connection
from millrace.engine.server.status import FINISH_STATUS, REQUEST_ID_KEY, log_safe
from millrace.engine.server.text_calls import TextCalls
from millrace.v1 import inference_pb2 as pb
from millrace.v1.inference_pb2_grpc import InferenceServicer


class InferenceService(InferenceServicer):
    """`engine` gives the engine, or raises EngineUnavailable while there is none."""

    def __init__(self, engine: Callable[[], AsyncEngine]) -> None:
        self._engine = engine
        self._text = TextCalls(engine)

    async def Generate(
        self, request: pb.GenerateRequest, context: ServicerContext[Any, Any]
    ) -> None:
        """Stream one request: a message for each step that has something to say."""
        request_id = convert.given_or_new_id(request.request_id)
        wanted = convert.generation_request(request, request_id, caller_of(context))
        finishes: set[FinishReason] = set()
        async with aclosing(self._outputs(wanted, context)) as outputs:
            async for output in outputs:
                await context.write(convert.generate_response(output))
                finishes |= {delta.finish for delta in output.outputs if delta.finish}
        await _end(finishes, context)

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest], context: ServicerContext[Any, Any]
    ) -> None:
        """Serve many requests on one stream."""
        await Connection(self._engine(), requests, context).run()

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        return await self._text.tokenize(request)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: ServicerContext[Any, Any]
    ) -> pb.DetokenizeResponse:
        return await self._text.detokenize(request)

    async def Score(
        self, request: pb.ScoreRequest, context: ServicerContext[Any, Any]
    ) -> pb.ScoreResponse:
        """Answer with the log-probabilities of the prompt's tokens."""
        request_id = convert.given_or_new_id("")
        wanted = convert.score_request(request, request_id, caller_of(context))
        tokens: list[TokenLogprobs] = []
        finishes: set[FinishReason] = set()
        num_prompt_tokens = 0
        async with aclosing(self._outputs(wanted, context)) as outputs:
            async for output in outputs:
                tokens += output.prompt_logprobs
                finishes |= {delta.finish for delta in output.outputs if delta.finish}
                if output.summary is not None:
                    num_prompt_tokens = output.summary.prompt_tokens
        await _end(finishes, context)
        if num_prompt_tokens < 2:
            limit = "at least two tokens"
            raise InvalidRequest(f"prompt must have {limit}: the first has none", "prompt", limit)
        return convert.score_response(tokens, num_prompt_tokens)

    async def GetModel(
        self, request: pb.GetModelRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        engine = self._engine()
        return convert.model_response(
            engine.model,
            eos_token_ids=sorted(engine.tokenizer.eos_ids),
            has_chat_template=engine.chat_template is not None,
            version=version("millrace"),
        )

    async def _outputs(
        self, wanted: GenerationRequest, context: ServicerContext[Any, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Submit a lone request and yield its outputs; raises its error after what it had.

        Whatever ends the caller (a cancel, a disconnect, the call's deadline) ends the request.
        """
        engine = self._engine()
        accepted = ((REQUEST_ID_KEY, log_safe(wanted.request_id)),)
        context.set_trailing_metadata(accepted)
        outbox = Outbox()
        try:
            await engine.submit(wanted, outbox)
            await context.send_initial_metadata(accepted)
            outbox.end()
            while batch := await outbox.take():
                for output in batch:
                    if output.outputs or output.prompt_logprobs or output.summary:
                        yield output
                    if output.error is not None:
                        raise output.error
        finally:
            outbox.close()


async def _end(finishes: Set[FinishReason], context: ServicerContext[Any, Any]) -> None:
    """Abort a call whose request was cut short; what it had has been sent."""
    for finish, status in FINISH_STATUS.items():
        if finish in finishes:
            await context.abort(status.code, status.message, context.trailing_metadata())
