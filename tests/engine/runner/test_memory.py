"""The size of the KV cache: measured on a GPU (here by a scripted probe), by settings elsewhere."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core, resolve_placement
from millrace.engine.errors import InvalidRequest, NotEnoughMemory
from millrace.engine.models.decoder import Decoder
from millrace.engine.models.registry import model_config
from millrace.engine.runner.assemble import Assembly
from millrace.engine.runner.graphs import DirectCalls, Draws, Graphs
from millrace.engine.runner.memory import (
    kv_blocks,
    largest_that_fits,
    measured_budget,
    room_for,
    what_to_lower,
)
from millrace.engine.runner.sizes import Sizes, sizes_for
from millrace.engine.runner.worst_case import largest_chunks, run_worst_case
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.engine.weights.locate import ModelLocation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9
CONTEXT_BLOCKS = 32  # of 16 tokens: a CPU's sparse products take a token once a row


@dataclass
class FakeProbe:
    """A device of 80 GB of which 60 are free; the watched step takes 3 at its peak."""

    free: int = 60 * GB
    peak_bytes: int = 3 * GB
    log: list = field(default_factory=list)

    def free_and_total(self):
        self.log.append("free")
        return self.free, 80 * GB

    def start(self):
        self.log.append("start")

    def peak(self):
        self.log.append("peak")
        return self.peak_bytes


def assembly_of(tiny_llama, make_calls=lambda step: DirectCalls(step.decode), **settings):
    settings = {"max_running": 6, "max_step_tokens": 40} | settings
    config = EngineConfig(device="cpu", dtype="float32", **settings)
    placement = resolve_placement(config)
    checkpoint = open_checkpoint(tiny_llama.path)
    model = model_config(checkpoint.config, {})
    decoder = Decoder(model, checkpoint, placement.operations, torch.float32, CPU, 512)
    return Assembly(config, placement, decoder, 512, sizes_for(config, CPU), make_calls)


@pytest.fixture
def model(tiny_llama):
    return model_config(open_checkpoint(tiny_llama.path).config, {})


def test_the_cache_gets_what_the_fraction_leaves_beside_the_largest_step():
    probe = FakeProbe()
    budget = measured_budget(probe, 0.9, lambda: probe.log.append("step"))
    assert budget == 60 * GB - 8 * GB - 3 * GB
    assert probe.log == ["start", "step", "peak", "free"]


def test_graphs_are_captured_before_the_memory_is_counted(tiny_llama):
    log = []

    class Recorder:
        def warm_up(self, call):
            call()

        def record(self, call):
            log.append("capture")

        def free_bytes(self):
            return 0

    def graphs(step):
        return Graphs(step.decode, (1, 6), (512,), Recorder(), step.addresses)

    probe = FakeProbe(log=log)
    assembly_of(tiny_llama, graphs).measure(probe, CONTEXT_BLOCKS)
    assert log == ["capture"] * 2 * len(Draws) + ["start", "peak", "free"]


@pytest.mark.parametrize("max_step_tokens", [6, 7, 40, 511, 517, 1100, 5000])
def test_the_largest_step_is_as_large_as_the_settings_allow(max_step_tokens):
    chunks = largest_chunks(slots=6, max_context=512, max_step_tokens=max_step_tokens)
    decodes = 6 - len(chunks)
    total = sum(chunk.length for chunk in chunks) + decodes
    assert total == min(max_step_tokens, 6 * 512)
    assert all(chunk.start + chunk.length == 512 for chunk in chunks)
    assert [chunk.slot for chunk in chunks] == [5 - i for i in range(len(chunks))]


@pytest.mark.parametrize("max_step_tokens", [6, 40, 1100])
def test_nobody_notices_that_the_largest_step_was_run(make_runner_world, max_step_tokens):
    tokens = []
    for run_before in (False, True):
        world = make_runner_world(max_running=6, max_step_tokens=max_step_tokens)
        runner = world.core._runner
        if run_before:
            run_worst_case(runner._step, runner._copies, max_step_tokens)
        world.submit(1, list(range(20, 60)), max_tokens=12, temperature=0.9, ignore_eos=True)
        world.submit(2, list(range(20, 40)), max_tokens=12, temperature=0.0, ignore_eos=True)
        tokens.append({i: got.token_ids for i, got in world.run().items()})
    assert tokens[0] == tokens[1]
    assert len(tokens[0][1]) == 12


@pytest.mark.parametrize(
    ("room", "expected"),
    [(10_000, (8000, 2000)), (6_000, (4000, 2000)), (4_000, (2000, 2000)), (2_500, (1000, 1500))],
)
def test_a_default_step_gives_way_until_a_whole_context_fits(room, expected):
    """The device runs out of memory where even the step does not fit."""

    def budget_of(size):
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return room - size

    assert largest_that_fits([8000, 4000, 2000, 1000], budget_of, wanted=2000) == expected
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits([room + 1], budget_of, wanted=0)


def test_the_size_that_fitted_is_the_one_that_was_measured(tiny_llama):
    """With the first size no context would fit beside the step; with its half one does."""
    probe = FakeProbe(free=9 * GB)  # of 80, and 8 stay free
    peaks = [2 * GB, GB // 2]
    probe.peak = lambda: peaks.pop(0)
    assembly = assembly_of(tiny_llama, max_step_tokens=None)
    assembly = replace(assembly, sizes=Sizes(6, 1024, 0))
    assert assembly.measure(probe, CONTEXT_BLOCKS) == (512, GB // 2)


def fail(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("place", "name", "what"),
    [
        ("millrace.engine.core.build", "Decoder", "the model"),
        ("millrace.engine.runner.assemble", "RequestTable", r"a KV cache of \d+ blocks"),
        ("millrace.engine.runner.assemble", "DirectCalls", "the graphs of decode steps"),
    ],
)
def test_whatever_does_not_fit_at_the_start_is_named(tiny_llama, monkeypatch, place, name, what):
    monkeypatch.setattr(f"{place}.{name}", fail)
    config = EngineConfig(device="cpu", dtype="float32", max_running=9)
    advice = "lower max_step_tokens = 512 or max_running = 9, or choose a smaller model or dtype"
    with pytest.raises(NotEnoughMemory, match=f"^no room for {what} on cpu; {advice}$"):
        build_core(config, ModelLocation(tiny_llama.path, "tiny", "folder"))


def test_a_measured_budget_becomes_blocks(model):
    block_bytes = model.kv_elements_per_token * 2 * 16
    blocks = kv_blocks(EngineConfig(), model, torch.bfloat16, CUDA, measured=block_bytes * 7 + 5)
    assert blocks == 7


def test_no_room_says_what_to_lower(model):
    config = EngineConfig(max_step_tokens=8192)
    with pytest.raises(NotEnoughMemory, match="max_step_tokens = 8192 or max_running = 256"):
        kv_blocks(config, model, torch.bfloat16, CUDA, measured=-5)


def test_a_configured_cache_that_is_too_small_is_refused_by_name(model):
    with pytest.raises(InvalidRequest, match="kv_cache_memory") as refused:
        kv_blocks(EngineConfig(kv_cache_memory=10), model, torch.bfloat16, CPU)
    assert refused.value.field == "kv_cache_memory"


def test_a_failed_allocation_says_what_did_not_fit_and_what_to_lower():
    config = EngineConfig(kv_cache_memory=123)
    with (
        pytest.raises(
            NotEnoughMemory, match="no room for the cache on cuda; lower kv_cache_memory = 123 or"
        ),
        room_for("the cache", config, CUDA),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_are_not_mistaken_for_it():
    with pytest.raises(RuntimeError, match="shape"), room_for("it", EngineConfig(), CUDA):
        raise RuntimeError("shape mismatch")


def test_a_cache_beyond_the_machine_is_a_typed_error(tiny_llama):
    config = EngineConfig(device="cpu", dtype="float32", kv_cache_memory=10**17)
    with pytest.raises(NotEnoughMemory, match=f"lower kv_cache_memory = {10**17}"):
        build_core(config, ModelLocation(tiny_llama.path, "tiny", "folder"))


def test_advice_on_a_gpu_begins_with_its_share():
    assert what_to_lower(EngineConfig(), CUDA).startswith("lower gpu_memory_fraction")


def test_a_runner_over_graphs_serves_like_one_without(tiny_llama, make_runner_world):
    """The whole path of CUDA but for CUDA: measured, captured, padded and replayed."""

    class Recorder:
        def warm_up(self, call):
            call()

        def record(self, call):
            return type("Tape", (), {"replay": lambda self: call()})()

        def free_bytes(self):
            return 0

    def graphs(step):
        return Graphs(step.decode, (1, 2, 6), (40, 512), Recorder(), step.addresses)

    tokens = []
    for is_captured in (False, True):
        world = make_runner_world(max_running=6, max_step_tokens=40)
        if is_captured:
            assembly = assembly_of(tiny_llama, graphs)
            assembly.measure(FakeProbe(), CONTEXT_BLOCKS)
            blocks = world.core.scheduler.pool.num_blocks
            step = assembly.step(blocks)
            world.core._runner._step = step
            world.core._runner._table = step.table
            world.core._runner._calls = assembly.make_calls(step)
        for index in range(5):
            prompt = list(range(20 + index, 50))
            asked = ({}, {"top_k": 9}, {"logprobs": 2})[index % 3]
            world.submit(index, prompt, 9 + index, seed=index, ignore_eos=True, **asked)
        tokens.append({i: (got.token_ids, got.logprobs) for i, got in world.run().items()})
    assert tokens[0] == tokens[1]
    assert len(tokens[0][2][1]) == 11
