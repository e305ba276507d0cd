"""The stopwatch, on a device whose clock the test turns: launches, graphs and rotating buffers."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from millrace.perf import measure
from millrace.perf.measure import MAX_ROTATIONS, SAMPLE_S, rotations, time_calls

GPU = SimpleNamespace(type="cuda")
L2_BYTES = 60 << 20


class FakeGpu:
    """Calls advance its clock. A graph replays what was called while it was captured."""

    def __init__(self):
        self.now_s = 0.0
        self.capturing = None
        self.graphs = []  # how many calls each one holds
        self.live_graphs = 0

    def call(self, seconds):
        def run():
            if self.capturing is None:
                self.now_s += seconds
            else:
                self.capturing.append(seconds)

        return run


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_s = fake.now_s

        def elapsed_time(self, later):
            return 1e3 * (later.at_s - self.at_s)

    class Graph:
        def __init__(self):
            self.calls = []
            fake.live_graphs += 1

        def replay(self):
            fake.now_s += sum(self.calls)

        def reset(self):
            fake.live_graphs -= 1

    @contextmanager
    def capture(graph):
        fake.capturing = graph.calls
        yield
        fake.capturing = None
        fake.graphs.append(len(graph.calls))

    cuda = SimpleNamespace(
        Event=Event,
        CUDAGraph=Graph,
        graph=capture,
        synchronize=lambda device=None: None,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=L2_BYTES),
    )
    monkeypatch.setattr(measure.torch, "cuda", cuda)
    monkeypatch.setattr(measure, "WARM_UP_S", 1e-4)
    return fake


def test_a_calls_time_is_that_of_its_launch_on_the_device(gpu):
    timing = time_calls([gpu.call(50e-6)] * 4, GPU)
    assert timing.median_us == pytest.approx(50)
    assert timing.p20_us == pytest.approx(50) and timing.p80_us == pytest.approx(50)
    assert timing.mode == "graph"


def test_a_sample_lasts_long_beside_the_start_of_a_graph(gpu):
    timing = time_calls([gpu.call(2e-6)] * 3, GPU)
    assert timing.calls * 2e-6 >= SAMPLE_S
    assert timing.calls % 3 == 0, "each buffer as often as the others"
    assert gpu.graphs[-1] == timing.calls


def test_graphs_give_their_memory_back(gpu):
    time_calls([gpu.call(5e-6)], GPU)
    assert gpu.live_graphs == 0


def test_a_call_that_waits_for_the_device_is_never_captured(gpu):
    timing = time_calls([gpu.call(1e-3)], GPU, capturable=False)
    assert timing.mode == "launches" and timing.median_us == pytest.approx(1000)
    assert gpu.graphs == []


def test_the_median_and_its_neighbours_are_of_the_samples():
    timing = measure._timing(
        [1e-6 * n for n in (90, 10, 30, 50, 70, 20, 40, 60, 80, 100, 0)], 2, ""
    )
    assert (timing.p20_us, timing.median_us, timing.p80_us) == pytest.approx((10, 25, 40))


def test_what_a_call_raises_comes_out(gpu):
    def broken():
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        time_calls([broken], GPU)


@pytest.mark.parametrize("size", [1, 1 << 20, 10 << 20, L2_BYTES, 10 * L2_BYTES])
def test_rotating_buffers_exceed_the_cache_or_their_limit(gpu, size):
    count = rotations(size, GPU)
    assert count * size >= 2 * L2_BYTES or count == MAX_ROTATIONS
    assert count == 1 or (count - 1) * size < 4 * L2_BYTES


def test_a_dry_run_needs_one_buffer():
    assert rotations(1, torch.device("cpu")) == 1


def test_a_dry_run_uses_the_hosts_clock():
    timing = time_calls([lambda: sum(range(1000))], torch.device("cpu"))
    assert timing.mode == "host" and timing.median_us > 0
