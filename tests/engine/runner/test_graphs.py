"""The ladder; the order, memory and addresses of captures, by a recorder that only takes notes."""

from dataclasses import dataclass, field

import pytest

from millrace.engine.runner.graphs import (
    CaptureBar,
    DirectCalls,
    Draws,
    Graphs,
    StepShape,
    contexts,
    ladder,
    shapes_to_capture,
)

PLAIN, FILTERED, SCORED = Draws


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
        size = calls.fit(StepShape(rows, 9, PLAIN)).rows
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


def test_the_default_ladder_has_so_many_graphs():
    """Each costs a start two captures, and memory: a kind of its own is no small matter."""
    shapes = shapes_to_capture(ladder(256), contexts(131_072))
    counts = {kind: sum(shape.draws is kind for shape in shapes) for kind in Draws}
    assert counts == {PLAIN: 108, FILTERED: 108, SCORED: 27}


def graphs_of(ran, recorder, sizes=(1, 2), lengths=(8, 64), addresses=list, **options):
    return Graphs(ran.append, sizes, lengths, recorder, addresses, **options)


def test_the_largest_is_captured_first_and_every_shape_runs_once_before():
    recorder, ran, seen = FakeRecorder(), [], []
    bar = CaptureBar(lambda *step: seen.append(step), passes=1)
    graphs_of(ran, recorder, bar=bar)
    shapes = [
        StepShape(rows, context, draws)
        for rows in (2, 1)
        for context, kinds in ((64, (SCORED, FILTERED, PLAIN)), (8, (FILTERED, PLAIN)))
        for draws in kinds
    ]
    assert ran == shapes[:1] + [shape for shape in shapes for _ in range(2)]
    assert recorder.log == ["warm up"] + ["warm up", "record"] * 10
    assert seen == [("decode graphs", done, 10) for done in range(1, 11)]


def test_a_start_that_captures_twice_has_one_bar():
    seen = []
    bar = CaptureBar(lambda *step: seen.append(step), passes=2)
    for _ in range(2):
        graphs_of([], FakeRecorder(), sizes=(1,), lengths=(8,), bar=bar)
    assert seen == [("decode graphs", done, 6) for done in range(1, 7)]


def test_memory_is_that_of_all_captures_together():
    graphs = graphs_of([], FakeRecorder())
    assert len(graphs) == 10 and graphs.num_bytes == 1000 + 9 * 10


def test_replay_runs_the_smallest_shape_that_holds_the_batch():
    ran = []
    graphs = graphs_of(ran, FakeRecorder(), ladder(40), contexts(10_000))
    ran.clear()
    for rows, context in ((1, 1), (3, 2048), (8, 2049), (9, 8192), (33, 8193)):
        graphs.replay(graphs.fit(StepShape(rows, context, PLAIN)))
    expected = ((1, 2048), (4, 2048), (8, 8192), (16, 8192), (40, 10_000))
    assert ran == [StepShape(*shape, PLAIN) for shape in expected]


@pytest.mark.parametrize(("draws", "context"), [(PLAIN, 8), (FILTERED, 8), (SCORED, 64)])
def test_each_kind_of_draw_has_graphs_and_scored_ones_at_the_longest_context(draws, context):
    ran = []
    graphs = graphs_of(ran, FakeRecorder(), sizes=(1, 2, 4))
    ran.clear()
    for rows in (1, 3):
        graphs.replay(graphs.fit(StepShape(rows, 5, draws)))
    assert ran == [StepShape(1, context, draws), StepShape(4, context, draws)]


def test_a_tensor_that_moved_is_noticed_before_anything_is_written():
    addresses, ran = [1, 2], []
    graphs = graphs_of(ran, FakeRecorder(), addresses=lambda: list(addresses))
    ran.clear()
    addresses[1] = 3
    with pytest.raises(AssertionError, match="moved"):
        graphs.replay(StepShape(1, 8, PLAIN))
    assert ran == []


def test_what_the_first_run_makes_counts_as_recorded():
    """Workspaces are made in the warm-up; from the first capture on they stay."""
    made = []
    graphs = graphs_of(made, FakeRecorder(), addresses=lambda: [id(made[0])])
    graphs.replay(StepShape(1, 8, PLAIN))


def test_direct_calls_take_every_shape_unless_told():
    ran = []
    calls = DirectCalls(ran.append)
    shapes = [StepShape(3, 17, FILTERED), StepShape(2, 5, SCORED)]
    for shape in shapes:
        calls.replay(calls.fit(shape))
    assert ran == shapes
