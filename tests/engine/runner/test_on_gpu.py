"""The runner on a GPU: graphs, copies and memory for real. Skipped where there is none."""

import numpy as np
import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.messages import NewRequest, StepOutput
from millrace.engine.runner.graphs import DirectCalls, Graphs
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.weights.locate import ModelLocation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
PLAIN = ({"temperature": 0.0}, {"temperature": 0.8})
FILTERED = (*PLAIN, {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.3})
SCORED = (*FILTERED, {"temperature": 0.8, "top_k": 20, "logprobs": 3})
KINDS = pytest.mark.parametrize("asked", [PLAIN, FILTERED, SCORED], ids=["plain", "filters", "all"])


def core_of(path, **settings):
    settings = {"max_running": 8, "max_step_tokens": 64, "kv_cache_memory": 10**7} | settings
    config = EngineConfig(device="cuda", **({"dtype": "float32"} | settings))
    return build_core(config, ModelLocation(path, "tiny", "folder"))[0]


def submit(core, count, max_tokens=24, asked=FILTERED):
    for index in range(count):
        prompt = np.random.default_rng(index).integers(3, 199, 16 + index).astype("<i4")
        chosen = asked[index % len(asked)]
        params = SamplingParams(**chosen, max_tokens=max_tokens, seed=index)
        core.handle(NewRequest(index, prompt.tobytes(), params, max_tokens, [], 0.0))


def tokens_of(core, count, asked=FILTERED):
    """Of each request its tokens, and their logprobs where it asked for some."""
    submit(core, count, asked=asked)
    tokens = [([], []) for _ in range(count)]
    while not core.is_idle:
        for message in core.step():
            for delta in message.deltas if isinstance(message, StepOutput) else ():
                tokens[delta.id][0].extend(delta.token_ids)
                tokens[delta.id][1].extend(delta.logprobs or ())
    return tokens


@KINDS
@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_graphs_draw_the_tokens_of_direct_calls(tiny_llama, run_ahead, asked):
    captured = core_of(tiny_llama.path, run_ahead=run_ahead)
    assert isinstance(captured._runner._calls, Graphs)
    direct = core_of(tiny_llama.path, run_ahead=0)
    direct._runner._calls = DirectCalls(direct._runner._step.decode, captured._runner._calls._sizes)
    drawn = tokens_of(captured, 5, asked)
    assert drawn == tokens_of(direct, 5, asked)
    for index, (tokens, scores) in enumerate(drawn):
        is_scored = "logprobs" in asked[index % len(asked)]
        assert [entry.token_id for entry in scores] == (tokens if is_scored else [])


@KINDS
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_steady_decode_step_neither_waits_nor_allocates(
    tiny_llama, monkeypatch, deterministic, asked
):
    core = core_of(tiny_llama.path, deterministic=deterministic)
    submit(core, 5, max_tokens=100, asked=asked)
    for _ in range(6):
        core.step()
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    execute = core._runner.execute

    def watched(plan):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return execute(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(core._runner, "execute", watched)
    for _ in range(20):
        core.step()
    assert core.scheduler.num_running == 5, "a step that failed would have ended them"
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments


def test_the_cache_fills_its_share_and_no_more(tiny_llama):
    core = core_of(tiny_llama.path, kv_cache_memory=None, gpu_memory_fraction=0.5)
    tokens_of(core, 5)
    free, total = torch.cuda.mem_get_info()
    assert 0.45 < 1 - free / total < 0.55  # others may run beside it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logprobs_are_the_same_bits_alone_in_a_crowd_and_in_chunks(tiny_llama, dtype):
    """Graphs and eager steps, products of few rows and of many."""

    def logprobs_of(count, max_step_tokens):
        core = core_of(
            tiny_llama.path, dtype=dtype, deterministic=True, max_step_tokens=max_step_tokens
        )
        prompt = np.random.default_rng(0).integers(3, 199, 150).astype("<i4").tobytes()
        asked = SamplingParams(temperature=0.8, max_tokens=24, seed=1, logprobs=3)
        core.handle(NewRequest(99, prompt, asked, 24, [], 0.0))
        submit(core, count)
        scores = []
        while not core.is_idle:
            for message in core.step():
                for delta in message.deltas if isinstance(message, StepOutput) else ():
                    scores += delta.logprobs or [] if delta.id == 99 else []
        return scores

    alone = logprobs_of(0, 256)
    assert logprobs_of(7, 256) == alone and logprobs_of(7, 33) == alone
