"""The ladder; the order, memory and addresses of captures, by a recorder that only takes notes."""

from dataclasses import dataclass, field

import pytest

from millrace.engine.runner.graphs import DirectCalls, Graphs, ladder


@dataclass
class Tape:
    """Replays by doing what was recorded."""

    call: object

    def replay(self):
        self.call()


@dataclass
class FakeRecorder:
    """The first recording takes `first` bytes, each other `other`: they share what is taken."""

    first: int = 1000
    other: int = 10
    log: list = field(default_factory=list)
    free: int = 1_000_000

    def warm_up(self, call):
        call()
        self.log.append("warm up")

    def record(self, call):
        call()
        self.free -= self.other if "record" in self.log else self.first
        self.log.append("record")
        return Tape(call)

    def free_bytes(self):
        return self.free


@pytest.mark.parametrize(
    ("max_running", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
        (40, (1, 2, 4, 8, 16, 24, 32, 40)),
    ],
)
def test_ladder(max_running, sizes):
    assert ladder(max_running) == sizes


@pytest.mark.parametrize("max_running", [*range(1, 70), 127, 128, 129, 255, 256, 257, 500, 1024])
def test_every_batch_has_a_size_and_little_padding(max_running):
    sizes = ladder(max_running)
    assert sizes[-1] == max_running and list(sizes) == sorted(set(sizes))
    graphs = DirectCalls(lambda size: None, sizes)
    for rows in range(1, max_running + 1):
        size = graphs.size_for(rows)
        assert size >= rows
        assert size - rows < max(8, rows / 8)


def test_the_largest_is_captured_first_and_every_size_runs_once_before():
    recorder, ran, seen = FakeRecorder(), [], []
    Graphs(ran.append, (1, 2, 4), recorder, lambda: [], lambda *p: seen.append(p))
    assert ran == [4, 4, 4, 2, 2, 1, 1]
    assert recorder.log == ["warm up"] + ["warm up", "record"] * 3
    assert seen[0] == ("decode graph of 4", 1, 3) and seen[-1] == ("decode graph of 1", 3, 3)


def test_memory_is_that_of_all_captures_together():
    graphs = Graphs(lambda size: None, (1, 2, 4), FakeRecorder(), lambda: [])
    assert graphs.num_bytes == 1020


def test_replay_runs_the_size_that_was_asked_for():
    ran = []
    graphs = Graphs(ran.append, ladder(40), FakeRecorder(), lambda: [])
    ran.clear()
    for rows in (1, 3, 8, 9, 33):
        graphs.replay(graphs.size_for(rows))
    assert ran == [1, 4, 8, 16, 40]


def test_a_tensor_that_moved_is_noticed_before_anything_is_written():
    addresses, ran = [1, 2], []
    graphs = Graphs(ran.append, (1,), FakeRecorder(), lambda: list(addresses))
    ran.clear()
    addresses[1] = 3
    with pytest.raises(AssertionError, match="moved"):
        graphs.replay(1)
    assert ran == []


def test_what_the_first_run_allocates_may_still_move():
    """Workspaces are made in the warm-up; from the first capture on they stay."""
    addresses = []
    graphs = Graphs(addresses.append, (4,), FakeRecorder(), lambda: addresses[:1])
    graphs.replay(4)


def test_direct_calls_take_every_size_unless_told():
    ran = []
    calls = DirectCalls(ran.append)
    calls.replay(calls.size_for(3))
    assert ran == [3]
