"""AsyncEngine over a real process and real sockets: every request ends once, whatever happens."""

import asyncio
import json
import os
import signal
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import tokenizers

from millrace.engine.async_engine import AsyncEngine, Outbox
from millrace.engine.config import EngineConfig
from millrace.engine.core.process import CoreProcess
from millrace.engine.errors import (
    DuplicateRequest,
    EngineUnavailable,
    InvalidRequest,
    MillraceError,
    Overloaded,
    StepFailed,
)
from millrace.engine.input import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from millrace.engine.output import OutputDelta, Summary
from millrace.engine.sampling_params import SamplingParams
from tests.engine.fake_core import (
    CACHED_TOKENS,
    DEATH_CODE,
    EOS,
    FAILING_TOKEN,
    FLUSHED_BLOCKS,
    MAX_CONTEXT,
    OVERLOAD_TOKEN,
    REFUSED_TOKEN,
    ByteTokenizer,
    fake_core_command,
)

TIMEOUT_S = 30.0
SOON_S = 1.0
FOREVER = 4000  # tokens
SLOW = ("--step-s", "0.01")


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


@asynccontextmanager
async def engine_of(*options, tokenizer=None, on_stats=None, **settings):
    """An AsyncEngine on a fake core, with two more attributes: `finished` requests and `core`."""
    config = EngineConfig(**settings)
    core = await CoreProcess.start(config, fake_core_command(*options))
    finished = []
    engine = AsyncEngine(
        core, tokenizer or ByteTokenizer(), None, config, on_stats, finished.append
    )
    engine.finished, engine.core = finished, core
    try:
        yield engine
    finally:
        await engine.close()


def ask(prompt, request_id="r", timeout_s=None, **params):
    """The fake core echoes the prompt, so this is also what to answer."""
    if isinstance(prompt, str):
        prompt = TextPrompt(prompt, add_special=False)
    elif isinstance(prompt, list):
        prompt = TokenPrompt(prompt)
    params = {"seed": 0, "max_tokens": 8} | params
    return GenerationRequest(request_id, prompt, SamplingParams(**params), timeout_s)


@dataclass
class Told:
    """All that an outbox told of one request."""

    outputs: dict[int, OutputDelta] = field(default_factory=dict)
    prompt_logprobs: list = field(default_factory=list)
    summary: Summary | None = None
    error: MillraceError | None = None
    count: int = 0  # RequestOutputs

    @property
    def ended(self):
        return self.summary is not None or self.error is not None

    def add(self, output):
        assert not self.ended, "nothing follows the last output"
        assert not (output.summary and output.error)
        for delta in output.outputs:
            if delta.index in self.outputs:
                self.outputs[delta.index].merge(delta)
            else:
                self.outputs[delta.index] = delta
        self.prompt_logprobs += output.prompt_logprobs
        self.summary, self.error = output.summary, output.error
        self.count += 1


async def take_all(outbox) -> dict[str, Told]:
    """Everything until the outbox's last request has ended, each exactly once."""
    outbox.end()
    told: dict[str, Told] = {}
    while batch := await outbox.take():
        for output in batch:
            told.setdefault(output.request_id, Told()).add(output)
    assert all(one.ended for one in told.values())
    assert outbox.num_live == 0
    return told


async def take_one(engine, request) -> Told:
    outbox = Outbox()
    await engine.submit(request, outbox)
    (told,) = (await take_all(outbox)).values()
    return told


async def until(condition) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 5.0, "it never came true"
        await asyncio.sleep(0.002)


# ---------------------------------------------------------------- streams


def test_a_stream_is_what_the_core_said():
    async def scenario():
        async with engine_of() as engine:
            told = await take_one(engine, ask("héllo, ", max_tokens=20))
            text = "héllo, héllo, hél"
            expected = OutputDelta(0, text, list(text.encode())[:20], finish="length")
            assert told.outputs == {0: expected}
            summary = told.summary
            assert (summary.prompt_tokens, summary.output_tokens, summary.seed) == (8, 20, 0)
            assert summary.cached_tokens == CACHED_TOKENS
            assert 0.0 <= summary.queue_s <= summary.first_token_s <= summary.total_s < TIMEOUT_S

    run(scenario)


def test_the_samples_of_a_prompt_stream_side_by_side():
    async def scenario():
        async with engine_of() as engine:
            told = await take_one(engine, ask("abcd", n=4, seed=1, max_tokens=4))
            texts = {index: output.text for index, output in told.outputs.items()}
            assert texts == {0: "bcda", 1: "cdab", 2: "dabc", 3: "abcd"}
            assert told.summary.output_tokens == 16
            assert told.summary.seed == 1
            assert told.summary.prompt_tokens == 4

    run(scenario)


def test_an_end_token_ends_one_sample_and_not_its_siblings():
    async def scenario():
        async with engine_of() as engine:
            told = await take_one(engine, ask([97, EOS, 98], n=2, max_tokens=None))
            assert told.outputs[0] == OutputDelta(0, "a", [97, EOS], None, "stop", EOS)
            assert told.outputs[1] == OutputDelta(1, "", [EOS], None, "stop", EOS)
            ignoring = ask([97, EOS, 98], ignore_eos=True, max_tokens=5)
            assert (await take_one(engine, ignoring)).outputs[0].text == "aba"

    run(scenario)


def test_logprobs_come_with_their_tokens():
    async def scenario():
        async with engine_of() as engine:
            told = await take_one(engine, ask("abc", n=2, logprobs=0, prompt_logprobs=0))
            for output in told.outputs.values():
                assert [entry.token_id for entry in output.logprobs] == output.token_ids
            assert [entry.token_id for entry in told.prompt_logprobs] == list(b"bc")

    run(scenario)


def test_a_stop_string_across_deltas_ends_the_stream_and_the_work():
    async def scenario():
        async with engine_of(*SLOW) as engine:
            told = await take_one(engine, ask("go END; ", stop=["END"], max_tokens=FOREVER))
            (output,) = told.outputs.values()
            assert (output.text, output.finish, output.stop_string) == ("go ", "stop", "END")
            assert told.summary.output_tokens == 6
            await until(lambda: engine.stats.step > 6 and engine.stats.running == 0)

    run(scenario)


def test_a_stop_string_ends_its_own_sample_only():
    async def scenario():
        async with engine_of() as engine:
            told = await take_one(engine, ask("abcd", n=2, stop=["cda"], max_tokens=3, seed=1))
            assert told.outputs[0].text == "bcd"  # "cda" would need a fourth token
            assert told.outputs[1].stop_string == "cda"
            assert (told.outputs[0].finish, told.outputs[1].finish) == ("length", "stop")

    run(scenario)


def test_five_hundred_streams_keep_apart():
    async def scenario():
        async with engine_of("--slots", "100") as engine:
            outbox = Outbox()
            prompts = {f"r{i}": f"<{i}>" for i in range(500)}
            for request_id, prompt in prompts.items():
                await engine.submit(ask(prompt, request_id, max_tokens=12), outbox)
            told = await take_all(outbox)
            for request_id, prompt in prompts.items():
                assert told[request_id].outputs[0].text == (prompt * 12)[:12]
            assert len(engine.finished) == 500

    run(scenario)


# ---------------------------------------------------------------- consumers


def test_a_consumer_that_keeps_up_gets_one_batch_a_step_with_all_its_requests():
    async def scenario():
        async with engine_of(*SLOW) as engine:
            outbox, sizes = Outbox(), []
            for i in range(4):
                await engine.submit(ask("abc", f"r{i}", max_tokens=20), outbox)
            outbox.end()
            while batch := await outbox.take():
                sizes.append(len(batch))
            assert (
                sizes.count(4) >= 10
            )  # the first and the last may differ, and the machine be busy
            assert len(sizes) <= 26

    run(scenario)


def test_a_slow_consumer_gets_everything_merged():
    async def scenario():
        async with engine_of() as engine:
            outbox = Outbox()
            for i in range(3):
                request = ask("slow! ", f"r{i}", max_tokens=300, n=2, logprobs=0)
                await engine.submit(request, outbox)
            assert await engine.drain(TIMEOUT_S) == 0
            batch = await outbox.take()
            assert [output.request_id for output in batch] == ["r0", "r1", "r2"]
            for output in batch:
                assert [delta.index for delta in output.outputs] == [0, 1]
                assert output.outputs[0].text == "slow! " * 50
                assert len(output.outputs[1].logprobs) == 300
                assert output.summary is not None

    run(scenario)


def test_a_consumer_that_leaves_takes_its_requests_with_it():
    async def scenario():
        async with engine_of(*SLOW, "--slots", "2") as engine:
            leaving, staying = Outbox(), Outbox()
            await engine.submit(ask("abc", max_tokens=30), staying)
            for i in range(4):
                await engine.submit(ask("abc", f"r{i}", max_tokens=FOREVER), leaving)
            await leaving.take()
            leaving.close()
            assert await leaving.take() == []
            assert leaving.num_live == 0
            assert (await take_all(staying))["r"].outputs[0].finish == "length"
            await until(lambda: engine.stats.running == engine.stats.waiting == 0)
            with pytest.raises(EngineUnavailable):
                await engine.submit(ask("abc"), leaving)

    run(scenario)


# ---------------------------------------------------------------- ids and refusals


def test_an_id_is_unique_among_the_live_requests_of_one_outbox():
    async def scenario():
        async with engine_of(*SLOW) as engine:
            outbox, other = Outbox(), Outbox()
            handle = await engine.submit(ask("abc", max_tokens=FOREVER), outbox)
            with pytest.raises(DuplicateRequest) as caught:
                await engine.submit(ask("abc"), outbox)
            assert caught.value.field == "request_id"
            await engine.submit(ask("abc"), other)
            assert (await take_all(other))["r"].outputs[0].finish == "length"
            handle.cancel()
            await engine.submit(ask("xyz"), outbox)  # its last output hasn't been taken yet
            first, second = await outbox.take(), await outbox.take()
            assert [output.request_id for output in first] == ["r"]
            assert first[0].outputs[0].finish == "cancelled"
            assert second[0].outputs[0].text.startswith("x")

    run(scenario)


def test_bad_requests_are_refused_at_once_and_leave_no_trace():
    async def scenario():
        async with engine_of() as engine:
            outbox = Outbox()
            bad = {
                "text": ask(""),
                "token_ids": ask([1] * MAX_CONTEXT),
                "temperature": ask("a", temperature=-1.0),
                "timeout_s": ask("a", timeout_s=-1.0),
                "messages": GenerationRequest("r", ChatPrompt([]), SamplingParams()),
            }
            for field_name, request in bad.items():
                with pytest.raises(InvalidRequest) as caught:
                    await engine.submit(request, outbox)
                assert caught.value.field == field_name
                assert outbox.num_live == 0
            assert [one.outcome for one in engine.finished] == ["refused"] * 5
            assert await take_all(outbox) == {}

    run(scenario)


def test_the_cores_refusals_and_failures_become_errors_of_that_request_alone():
    async def scenario():
        async with engine_of() as engine:
            outbox = Outbox()
            await engine.submit(ask([REFUSED_TOKEN], "never", n=3), outbox)
            await engine.submit(ask([OVERLOAD_TOKEN], "later"), outbox)
            await engine.submit(ask([97, FAILING_TOKEN], "fails", n=2), outbox)
            await engine.submit(ask("abc", "fine"), outbox)
            told = await take_all(outbox)
            assert type(told["never"].error) is InvalidRequest
            assert (told["never"].error.field, told["never"].error.limit) == (
                "prompt",
                "at most 10 blocks",
            )
            assert type(told["later"].error) is Overloaded
            assert told["later"].error.retry_after_s == 2.5
            assert type(told["fails"].error) is StepFailed
            assert told["fine"].outputs[0].text == "abcabcab"
            outcomes = sorted(one.outcome for one in engine.finished)
            assert outcomes == ["error", "length", "refused", "refused"]

    run(scenario)


def test_an_output_that_cannot_be_decoded_fails_alone():
    class Broken(ByteTokenizer):
        def text_bytes(self, ids, skip_special):
            if 98 in ids:
                raise RuntimeError("no such piece")
            return super().text_bytes(ids, skip_special)

    async def scenario():
        async with engine_of(*SLOW, tokenizer=Broken()) as engine:
            outbox = Outbox()
            await engine.submit(ask("aab", "bad", max_tokens=FOREVER), outbox)
            await engine.submit(ask("xyz", "good", max_tokens=12), outbox)
            told = await take_all(outbox)
            assert type(told["bad"].error) is StepFailed
            assert told["bad"].outputs[0].text == "aa"
            assert told["good"].outputs[0].text == "xyz" * 4
            await until(lambda: engine.stats.running == 0)

    run(scenario)


def test_a_core_that_does_not_answer_is_not_sent_requests_without_bound(monkeypatch):
    monkeypatch.setattr("millrace.engine.async_engine.STOP_TIMEOUT_S", 0.1)

    async def scenario():
        async with engine_of("--hang", max_running=1, max_waiting=2) as engine:
            outbox = Outbox()
            for i in range(6):
                handle = await engine.submit(ask("abc", f"r{i}"), outbox)
                handle.cancel()  # ends at once, but the core hasn't said that it knows
            with pytest.raises(Overloaded) as caught:
                await engine.submit(ask("abc", "one more"), outbox)
            assert "6" in caught.value.limit
            assert len(await take_all(outbox)) == 6

    run(scenario)


# ---------------------------------------------------------------- cancel and deadlines


class SlowTokenizer(ByteTokenizer):
    """Waits in `encode` until it is let go."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def _encode(self, text, add_special, parse_special):
        assert self.go.wait(TIMEOUT_S)
        return super()._encode(text, add_special, parse_special)


def cancelled_once(told, text):
    assert told.outputs[0].finish == "cancelled"
    assert told.outputs[0].text == text
    assert told.error is None
    return True


def test_cancel_while_tokenizing_ends_once_and_never_reaches_the_core():
    async def scenario():
        tokenizer = SlowTokenizer()
        async with engine_of(tokenizer=tokenizer) as engine:
            outbox = Outbox()
            submitting = asyncio.create_task(engine.submit(ask("abc"), outbox))
            await until(lambda: outbox.num_live == 1)
            assert outbox.cancel("r")
            assert not outbox.cancel("r")
            told = await take_all(outbox)
            assert cancelled_once(told["r"], "")
            tokenizer.go.set()
            handle = await submitting
            assert handle.ended
            assert engine.stats.step == 0
            assert [one.outcome for one in engine.finished] == ["cancelled"]

    run(scenario)


def test_a_submission_that_is_given_up_leaves_no_trace():
    async def scenario():
        tokenizer = SlowTokenizer()
        async with engine_of(tokenizer=tokenizer) as engine:
            outbox = Outbox()
            submitting = asyncio.create_task(engine.submit(ask("abc"), outbox))
            await until(lambda: outbox.num_live == 1)
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submitting
            assert outbox.num_live == 0
            tokenizer.go.set()
            await engine.submit(ask("xyz"), outbox)
            assert (await take_all(outbox))["r"].outputs[0].text == "xyzxyzxy"
            assert [one.outcome for one in engine.finished] == ["cancelled", "length"]

    run(scenario)


def test_cancel_while_queued_and_while_running():
    async def scenario():
        async with engine_of(*SLOW, "--slots", "1") as engine:
            outbox = Outbox()
            running = await engine.submit(ask("abc", "running", max_tokens=FOREVER), outbox)
            queued = await engine.submit(ask("abc", "queued", max_tokens=FOREVER), outbox)
            await outbox.take()
            queued.cancel()
            running.cancel()
            running.cancel()
            batch = await outbox.take()
            ends = {output.request_id: output for output in batch}
            assert ends["queued"].outputs == [OutputDelta(0, finish="cancelled")]
            assert ends["queued"].summary.output_tokens == 0
            assert ends["running"].outputs[0].finish == "cancelled"
            assert ends["running"].summary.output_tokens >= 1
            await until(lambda: engine.stats.running == engine.stats.waiting == 0)
            assert await take_all(outbox) == {}

    run(scenario)


def test_cancel_racing_the_last_token_ends_once():
    async def scenario():
        async with engine_of() as engine:
            outbox = Outbox()
            began = time.monotonic()
            await take_one(engine, ask("abc", max_tokens=3, n=2))
            whole_s = time.monotonic() - began  # so that the cancels fall before and after the end
            engine.finished.clear()
            for i in range(60):
                handle = await engine.submit(ask("abc", f"r{i}", max_tokens=3, n=2), outbox)
                await asyncio.sleep(i / 20 * whole_s)
                handle.cancel()
            told = await take_all(outbox)
            assert len(told) == len(engine.finished) == 60
            finishes = {told[f"r{i}"].outputs[0].finish for i in range(60)}
            assert finishes == {"cancelled", "length"}, "the race was never close"

    run(scenario)


def test_a_deadline_ends_a_request_running_or_queued_with_what_it_has():
    async def scenario():
        async with engine_of(*SLOW, "--slots", "1") as engine:
            outbox = Outbox()
            for request_id, timeout_s in {"running": 0.4, "queued": 0.2}.items():
                request = ask("abc", request_id, timeout_s=timeout_s, max_tokens=FOREVER)
                await engine.submit(request, outbox)
            told = await take_all(outbox)
            assert told["running"].outputs[0].finish == told["queued"].outputs[0].finish
            assert told["running"].outputs[0].finish == "deadline"
            assert 0 < told["running"].summary.output_tokens < 100
            assert told["queued"].summary.output_tokens == 0

    run(scenario)


def test_the_configured_deadline_is_for_requests_that_set_none():
    async def scenario():
        async with engine_of(*SLOW, default_timeout_s=0.05) as engine:
            outbox = Outbox()
            await engine.submit(ask("abc", "default", max_tokens=FOREVER), outbox)
            await engine.submit(ask("abc", "own", timeout_s=60.0, max_tokens=20), outbox)
            told = await take_all(outbox)
            assert told["default"].outputs[0].finish == "deadline"
            assert told["own"].outputs[0].finish == "length"

    run(scenario)


# ---------------------------------------------------------------- the engine's own life


def test_the_cores_death_ends_everything_within_a_second():
    async def scenario():
        tokenizer = SlowTokenizer()
        async with engine_of("--hang", tokenizer=tokenizer) as engine:
            outbox = Outbox()
            for i in range(20):
                await engine.submit(ask([97], f"r{i}", max_tokens=FOREVER), outbox)
            submitting = asyncio.create_task(engine.submit(ask("abc", "tokenizing"), outbox))
            flushing = asyncio.create_task(engine.flush_cache())
            await until(lambda: outbox.num_live == 21)
            began = time.monotonic()
            os.kill(engine.core.pid, signal.SIGKILL)
            told = await take_all(outbox)
            assert time.monotonic() - began < SOON_S
            assert len(told) == 21
            assert all(type(one.error) is EngineUnavailable for one in told.values())
            assert engine.status == "dead"
            assert await engine.wait_dead() == "was killed by SIGKILL"
            with pytest.raises(EngineUnavailable):
                await flushing
            with pytest.raises(EngineUnavailable):
                await engine.submit(ask("abc"), Outbox())
            with pytest.raises(EngineUnavailable):
                await engine.flush_cache()
            tokenizer.go.set()
            assert (await submitting).ended
            assert await engine.drain(1.0) == 0

    run(scenario)


def test_what_the_core_said_before_it_died_still_counts():
    async def scenario():
        async with engine_of(*SLOW, "--die-at", "5") as engine:
            told = await take_one(engine, ask("abcdefgh", max_tokens=FOREVER))
            assert str(DEATH_CODE) in str(told.error)
            assert told.outputs[0].text == "abcd"
            assert [one.outcome for one in engine.finished] == ["error"]

    run(scenario)


def test_drain_refuses_the_new_and_waits_for_the_live():
    async def scenario():
        async with engine_of(*SLOW) as engine:
            outbox = Outbox()
            await engine.submit(ask("abc", "short", max_tokens=10), outbox)
            endless = await engine.submit(ask("abc", "endless", max_tokens=FOREVER), outbox)
            draining = asyncio.create_task(engine.drain(0.5))
            await until(lambda: engine.status == "draining")
            with pytest.raises(EngineUnavailable, match="draining"):
                await engine.submit(ask("abc", "new"), outbox)
            assert await draining == 1
            endless.cancel()
            assert await engine.drain(0.5) == 0
            told = await take_all(outbox)
            assert told["short"].outputs[0].finish == "length"

    run(scenario)


def test_close_ends_what_is_live_and_can_be_repeated():
    async def scenario():
        async with engine_of(*SLOW) as engine:
            outbox = Outbox()
            await engine.submit(ask("abc", max_tokens=FOREVER), outbox)
            pid = engine.core.pid
            await engine.close()
            told = await take_all(outbox)
            assert type(told["r"].error) is EngineUnavailable
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            await engine.close()

    run(scenario)


def test_flushing_the_cache_returns_the_cores_answer():
    async def scenario():
        async with engine_of() as engine:
            answers = await asyncio.gather(engine.flush_cache(), engine.flush_cache())
            assert answers == [FLUSHED_BLOCKS, FLUSHED_BLOCKS]

    run(scenario)


def test_metrics_hear_of_every_step_and_of_every_end():
    async def scenario():
        steps = []
        async with engine_of(on_stats=steps.append) as engine:
            await take_one(engine, ask("abc", max_tokens=5))
            assert [stats.step for stats in steps] == [1, 2, 3, 4, 5]
            assert engine.stats is steps[-1]
            (finished,) = engine.finished
            assert finished.outcome == "length"
            assert (finished.prompt_tokens, finished.output_tokens) == (3, 5)
            assert len(finished.itl_s) == 4
            assert finished.total_s >= finished.first_token_s >= finished.prefill_s >= 0.0

    run(scenario)


def test_start_loads_the_text_side_of_a_model_folder(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "c": 2}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))

    async def scenario():
        config = EngineConfig(model=str(tmp_path))
        engine = await AsyncEngine.start(config, command=fake_core_command())
        try:
            assert engine.model.model == tmp_path.name
            assert engine.tokenizer.eos_ids == {3}
            assert engine.chat_template is None
            told = await take_one(engine, ask("abc"))
            assert told.outputs[0].text == "abcabcab"
        finally:
            await engine.close()

    run(scenario)


def test_a_core_that_cannot_start_is_an_error_of_start(tmp_path):
    async def scenario():
        with pytest.raises(MillraceError):
            await AsyncEngine.start(EngineConfig(model=str(tmp_path / "missing")))

    run(scenario)
