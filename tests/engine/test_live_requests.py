"""LiveRequests against a simulated core, in any order of events: exactly one end, nothing leaks."""

import asyncio
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.core.messages import Cancel, Delta, NewRequest, StepOutput, StepStats
from millrace.engine.errors import EngineUnavailable
from millrace.engine.live_requests import LiveRequests
from millrace.engine.outbox import Outbox
from millrace.engine.output import RequestProgress
from millrace.engine.sampling_params import SamplingParams
from tests.engine.fake_core import ByteTokenizer

MAX_STEPS = 200


class World:
    """Consumers, books and a core whose messages take their time."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.to_core: list = []  # sent, not yet heard
        self.running: dict[int, int] = {}  # sequence -> tokens until it ends
        self.finished = []
        self.live = LiveRequests(self.to_core.append, self.finished.append)
        self.outboxes = [Outbox() for _ in range(3)]
        self.handles = []
        self.withdrawn: set[str] = set()
        self.ends: Counter = Counter()
        self.next_id = 0

    # Each of these is one event; `play` picks among them.

    def open(self):
        outbox = self.random.choice([box for box in self.outboxes if box.open] or [None])
        if outbox is None:
            return
        params = SamplingParams(n=self.random.randint(1, 3), stop=["ab"], seed=0)
        progress = RequestProgress(params, ByteTokenizer(), arrival_s=0.0)
        handle = self.live.open(f"r{len(self.handles)}", outbox, progress)
        self.handles.append(handle)

    def launch(self):
        for handle in self.handles:
            if handle.first_id is None and not handle.ended:
                count = len(handle.progress.sequences)
                ids = range(self.next_id, self.next_id + count)
                self.next_id += count
                requests = [NewRequest(i, b"", SamplingParams(), 9, [], 0.0) for i in ids]
                self.live.launch(handle, requests)
                return

    def withdraw(self):
        for handle in self.handles:
            if handle.first_id is None and not handle.ended:
                self.live.withdraw(handle, "refused")
                self.withdrawn.add(handle.request_id)
                return

    def cancel(self):
        if self.handles:
            self.random.choice(self.handles).cancel()

    def close(self):
        self.random.choice(self.outboxes).close()

    def core_step(self):
        """The core hears what was sent (perhaps not all of it) and makes one step."""
        deltas = []
        heard = self.random.randint(0, len(self.to_core))
        for message in self.to_core[:heard]:
            if isinstance(message, NewRequest):
                self.running[message.id] = self.random.randint(1, 6)
                continue
            assert isinstance(message, Cancel)
            for sequence_id in message.ids:
                if self.running.pop(sequence_id, None) is not None:
                    deltas.append(Delta(sequence_id, [], finish=message.reason))
        del self.to_core[:heard]
        for sequence_id in list(self.running):
            self.running[sequence_id] -= 1
            delta = Delta(sequence_id, [self.random.choice(b"abc")])
            if self.running[sequence_id] == 0:
                del self.running[sequence_id]
                delta.finish = self.random.choice(["stop", "length", "refused", "error"])
            deltas.append(delta)
        self.live.apply(StepOutput(deltas, StepStats()))

    def take(self):
        outbox = self.random.choice(self.outboxes)
        for output in list(outbox._pending.values()):
            self.read(output)
        outbox._pending.clear()

    def read(self, output):
        assert self.ends[output.request_id] == 0, "nothing follows the end"
        self.ends[output.request_id] += (output.summary or output.error) is not None

    def play(self, events):
        for event in events:
            getattr(self, event)()


EVENTS = ["open", "open", "launch", "launch", "withdraw", "cancel", "close", "core_step", "take"]
EVENTS += ["core_step"] * 6


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(EVENTS), max_size=60),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_every_request_ends_once_and_the_books_are_empty_in_the_end(events, seed, core_dies):
    async def scenario():
        world = World(seed)
        world.play(events)
        if core_dies:
            world.live.end_all(EngineUnavailable("the core died"))
        else:
            for _ in range(MAX_STEPS):
                world.play(["launch", "core_step"])
        assert len(world.live) == world.live.num_sequences == 0
        await asyncio.wait_for(world.live.wait_idle(), 1)
        assert all(handle.ended for handle in world.handles)
        assert len(world.finished) == len(world.handles)
        for outbox in world.outboxes:
            assert outbox.num_live == 0
            for output in outbox._pending.values():
                world.read(output)
            outbox._pending.clear()
        told = {request_id for request_id, ends in world.ends.items() if ends}
        for handle in world.handles:  # a consumer that left may have been told, or not any more
            if handle.outbox.open:
                assert (handle.request_id in told) != (handle.request_id in world.withdrawn)
        assert not told & world.withdrawn

    asyncio.run(scenario())
