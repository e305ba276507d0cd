"""Pinned buffers against a device that copies late: at the last moment that its events allow."""

import numpy as np
import pytest
import torch

from millrace.engine.runner.copies import PinnedCopies, SharedMemory
from millrace.engine.runner.packed import PackedArrays

CPU = torch.device("cpu")


class LateDevice:
    """Makes events. Copies into and out of pinned memory happen when their event is waited for."""

    def __init__(self):
        self.pending = []
        self.waited = 0

    def make_event(self):
        device = self

        class Event:
            def __init__(self):
                self.copies = []

            def record(self):
                self.copies, device.pending = device.pending, []

            def synchronize(self):
                device.waited += bool(self.copies)
                for copy in self.copies:
                    copy()
                self.copies = []

        return Event()


class LateCopies(PinnedCopies):
    """The source of a fetch is read in the order of the queue; all else is late."""

    def __init__(self, device, depth):
        self.device = device
        super().__init__(CPU, depth, self._pinned, device.make_event)

    def _pinned(self, num_bytes):
        return torch.zeros(num_bytes, dtype=torch.uint8)


@pytest.fixture
def late(monkeypatch):
    device = LateDevice()
    copy = torch.Tensor.copy_

    def late_copy(destination, source, non_blocking=False):
        if not non_blocking:
            return copy(destination, source)
        is_fetch = destination.dtype == torch.int64
        kept = source.clone() if is_fetch else source
        device.pending.append(lambda: copy(destination, kept))
        return destination

    monkeypatch.setattr(torch.Tensor, "copy_", late_copy)
    return device


def packed_of(value, count=5):
    packed = PackedArrays()
    packed.add("numbers", np.full(count, value, np.int64))
    return packed


def test_a_buffer_is_not_written_again_while_its_copy_is_under_way(late):
    copies = LateCopies(late, depth=2)
    packs = [packed_of(value) for value in range(7)]
    arrived = [copies.send(packed) for packed in packs]
    for staging in copies._rings["send"]:
        staging.event.synchronize()
    values = [p.views(a)["numbers"][0].item() for p, a in zip(packs, arrived, strict=True)]
    assert values == list(range(7))


def test_a_ring_as_deep_as_the_steps_in_flight_never_waits_twice(late):
    copies = LateCopies(late, depth=3)
    waiting = []
    for step in range(10):
        waiting.append(copies.fetch(torch.full((3, 2), step)))
        if len(waiting) == 2:  # one step is read while one is in flight
            before = late.waited
            assert waiting.pop(0).wait().tolist() == [[step - 1] * 2] * 3
            assert late.waited == before + 1
    assert late.waited == 9  # each reading waited for its own copy; no taking did


def test_what_was_read_stays_when_the_buffer_is_used_again(late):
    copies = LateCopies(late, depth=1)
    first = copies.fetch(torch.tensor([[1, 2]])).wait()
    copies.fetch(torch.tensor([[3, 4]])).wait()
    assert first.tolist() == [[1, 2]]


def test_a_buffer_grows_only_after_its_last_copy(late):
    copies = LateCopies(late, depth=1)
    small, large = packed_of(1), packed_of(2, count=5000)
    first, second = copies.send(small), copies.send(large)
    copies._rings["send"][0].event.synchronize()
    assert small.views(first)["numbers"].tolist() == [1] * 5
    assert large.views(second)["numbers"].tolist() == [2] * 5000


def test_buffers_for_fetches_are_as_large_as_was_announced(late):
    copies = PinnedCopies(CPU, 1, lambda size: torch.zeros(size).byte(), late.make_event, 50_000)
    buffer = copies._rings["fetch"][0].buffer
    assert copies.fetch(torch.arange(6250)).wait()[-1] == 6249
    assert copies._rings["fetch"][0].buffer is buffer, "nothing is pinned while serving"


def test_shared_memory_hands_out_what_was_there_at_the_call():
    copies, tensor = SharedMemory(), torch.tensor([[1], [0], [1]])
    arrival = copies.fetch(tensor)
    tensor.fill_(9)
    assert arrival.wait().tolist() == [[1], [0], [1]]


def test_packed_arrays_keep_dtype_shape_and_values():
    packed = PackedArrays()
    arrays = {
        "flags": np.array([True, False, True]),
        "places": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2],  # strided
        "none": np.zeros((0, 4), np.float32),
        "rates": np.array([[0.5], [1.5]], np.float32),
        "ids": np.arange(7, dtype=np.int32),
    }
    for name, array in arrays.items():
        packed.add(name, array)
    views = packed.views(SharedMemory().send(packed))
    assert views.keys() == arrays.keys()
    for name, array in arrays.items():
        assert views[name].numpy().dtype == array.dtype
        assert np.array_equal(views[name].numpy(), array)
