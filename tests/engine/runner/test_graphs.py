"""The ladder; the order, memory and addresses of captures, by a recorder that only takes notes."""

from dataclasses import dataclass, field

import pytest

from millrace.engine.runner.graphs import DirectCalls, Graphs, StepShape, contexts, ladder


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
    calls = DirectCalls(lambda shape: None, sizes)
    for rows in range(1, max_running + 1):
        size = calls.fit(StepShape(rows, 9)).rows
        assert size >= rows
        assert size - rows < max(8, rows / 8)


@pytest.mark.parametrize(
    ("max_context", "lengths"),
    [
        (512, (512,)),
        (2048, (2048,)),
        (2049, (2048, 2049)),
        (131072, (2048, 8192, 32768, 131072)),
    ],
)
def test_contexts(max_context, lengths):
    assert contexts(max_context) == lengths


def graphs_of(ran, recorder, sizes=(1, 2), lengths=(8, 64), addresses=list, **options):
    return Graphs(ran.append, sizes, lengths, recorder, addresses, **options)


def test_the_largest_is_captured_first_and_every_shape_runs_once_before():
    recorder, ran, seen = FakeRecorder(), [], []
    graphs_of(ran, recorder, progress=lambda *step: seen.append(step))
    shapes = [StepShape(*pair) for pair in ((2, 64), (2, 8), (1, 64), (1, 8))]
    assert ran == shapes[:1] + [shape for shape in shapes for _ in range(2)]
    assert recorder.log == ["warm up"] + ["warm up", "record"] * 4
    assert seen == [("decode graphs", done, 4) for done in (1, 2, 3, 4)]


def test_memory_is_that_of_all_captures_together():
    assert graphs_of([], FakeRecorder()).num_bytes == 1030


def test_replay_runs_the_smallest_shape_that_holds_the_batch():
    ran = []
    graphs = graphs_of(ran, FakeRecorder(), ladder(40), contexts(10_000))
    ran.clear()
    for rows, context in ((1, 1), (3, 2048), (8, 2049), (9, 8192), (33, 8193)):
        graphs.replay(graphs.fit(StepShape(rows, context)))
    expected = ((1, 2048), (4, 2048), (8, 8192), (16, 8192), (40, 10_000))
    assert ran == [StepShape(*shape) for shape in expected]


def test_plain_steps_have_graphs_of_their_own_up_to_so_many_rows():
    ran = []
    graphs = graphs_of(ran, FakeRecorder(), (1, 2, 4), plain_rows=2)
    ran.clear()
    for rows, plain in ((1, True), (2, False), (2, True), (3, True)):
        graphs.replay(graphs.fit(StepShape(rows, 8, plain)))
    assert ran == [
        *(StepShape(1, 8, True), StepShape(2, 8), StepShape(2, 8, True)),
        StepShape(4, 8, False),
    ]


def test_a_tensor_that_moved_is_noticed_before_anything_is_written():
    addresses, ran = [1, 2], []
    graphs = graphs_of(ran, FakeRecorder(), addresses=lambda: list(addresses))
    ran.clear()
    addresses[1] = 3
    with pytest.raises(AssertionError, match="moved"):
        graphs.replay(StepShape(1, 8))
    assert ran == []


def test_what_the_first_run_makes_counts_as_recorded():
    """Workspaces are made in the warm-up; from the first capture on they stay."""
    made = []
    graphs = graphs_of(made, FakeRecorder(), addresses=lambda: [id(made[0])])
    graphs.replay(StepShape(1, 8))


def test_direct_calls_take_every_shape_unless_told():
    ran = []
    calls = DirectCalls(ran.append)
    calls.replay(calls.fit(StepShape(3, 17)))
    calls.replay(calls.fit(StepShape(2, 5, plain=True)))
    assert ran == [StepShape(3, 17), StepShape(2, 5, True)]
