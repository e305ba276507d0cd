"""Outbox: merging loses nothing, and `take` always comes to an end."""

import asyncio
from dataclasses import dataclass, field

from millrace.engine.core.messages import TokenLogprobs
from millrace.engine.outbox import Outbox, RequestOutput
from millrace.engine.output import OutputDelta, Summary

SUMMARY = Summary(1, 0, 2, 0.0, 0.0, 0.0, 0)


@dataclass(eq=False)
class Request:
    """What an outbox sees of one; cancelling it ends it at once."""

    request_id: str
    outbox: Outbox
    cancelled: list = field(default_factory=list)

    def cancel(self, reason="cancelled"):
        self.cancelled.append(reason)
        self.say(summary=SUMMARY)
        self.outbox.remove(self)

    def say(self, text="", index=0, summary=None, **logprobs):
        outputs = [OutputDelta(index, text, list(text.encode()))] if text else []
        self.outbox.put(self, RequestOutput(self.request_id, outputs, summary=summary, **logprobs))


def live(outbox, request_id="r"):
    request = Request(request_id, outbox)
    outbox.add(request)
    return request


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 10))


async def waits(outbox):
    """A take that has nothing to return yet."""
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0.01)
    assert not taking.done()
    return taking


def test_take_waits_for_a_first_output_and_returns_all_that_is_there():
    async def scenario():
        outbox = Outbox()
        taking = await waits(outbox)
        a, b = live(outbox, "a"), live(outbox, "b")
        a.say("x")
        b.say("y")
        assert [(o.request_id, o.outputs[0].text) for o in await taking] == [("a", "x"), ("b", "y")]
        (await waits(outbox)).cancel()

    run(scenario)


def test_outputs_of_one_request_merge_by_index_in_order():
    async def scenario():
        outbox = Outbox()
        request = live(outbox)
        entry = TokenLogprobs(1, -1.0, 1, [], [])
        request.say("a", 1, prompt_logprobs=[entry])
        request.say("b", 0)
        request.say("c", 1, prompt_logprobs=[entry])
        request.say(summary=SUMMARY)
        (output,) = await outbox.take()
        assert [(delta.index, delta.text) for delta in output.outputs] == [(1, "ac"), (0, "b")]
        assert output.outputs[0].token_ids == list(b"ac")
        assert output.prompt_logprobs == [entry, entry]
        assert output.summary is SUMMARY

    run(scenario)


def test_an_id_used_again_is_another_request():
    async def scenario():
        outbox = Outbox()
        first = live(outbox)
        first.say("old")
        assert outbox.cancel("r", "deadline")
        live(outbox).say("new")
        old, new = await outbox.take()
        assert (old.outputs[0].text, old.summary) == ("old", SUMMARY)
        assert (new.outputs[0].text, new.summary) == ("new", None)
        assert first.cancelled == ["deadline"]

    run(scenario)


def test_cancel_knows_live_ids_only():
    async def scenario():
        outbox = Outbox()
        assert not outbox.cancel("r")
        live(outbox)
        assert outbox.cancel("r")
        assert not outbox.cancel("r")

    run(scenario)


def test_after_end_take_returns_the_rest_and_then_nothing():
    async def scenario():
        outbox = Outbox()
        request = live(outbox)
        outbox.end()
        assert not outbox.open
        taking = await waits(outbox)
        request.cancel()
        assert len(await taking) == 1
        assert await outbox.take() == []

    run(scenario)


def test_a_request_that_never_began_does_not_keep_the_consumer_waiting():
    async def scenario():
        outbox = Outbox()
        request = live(outbox)
        outbox.end()
        taking = await waits(outbox)
        outbox.remove(request)
        assert await taking == []

    run(scenario)


def test_close_cancels_everything_and_drops_what_is_left():
    async def scenario():
        outbox = Outbox()
        requests = [live(outbox, f"r{i}") for i in range(3)]
        taking = await waits(outbox)
        requests[0].say("x")
        outbox.close()
        assert [request.cancelled for request in requests] == [["cancelled"]] * 3
        assert await taking == []
        requests[1].say("late")
        assert await outbox.take() == []
        assert outbox.num_live == 0

    run(scenario)
