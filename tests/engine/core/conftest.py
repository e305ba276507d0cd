"""A world of tokens only: tiny cores without a tokenizer, driven message by message."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.messages import Delta, NewRequest, StepOutput
from millrace.engine.runner.graphs import DirectCalls
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.weights.locate import ModelLocation

EOS = 2


@dataclass
class Collected:
    """Everything that one request was sent."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    last: Delta | None = None


class World:
    """An EngineCore and all that it has said."""

    def __init__(self, path, sizes=None, **settings):
        settings = {"max_running": 8, "max_step_tokens": 64, "block_size": 16} | settings
        config = EngineConfig(device="cpu", dtype="float32", **settings)
        location = ModelLocation(path, "tiny", "folder")
        self.core, self.ready = build_core(config, location)
        if sizes is not None:  # pad batches to these sizes, as CUDA graphs do
            runner = self.core._runner
            runner._calls = DirectCalls(runner._step.decode, sizes)
        self.got: dict[int, Collected] = {}
        self.stats = []
        self.answers = []

    def submit(self, request_id, prompt, max_tokens=16, *, leader=None, deadline_s=None, **params):
        stops = [] if params.get("ignore_eos") else [EOS]
        stops += params.get("stop_token_ids", [])
        settings = SamplingParams(**{"seed": 7, "max_tokens": max_tokens} | params)
        data = np.asarray(prompt, "<i4").tobytes()
        self.core.handle(
            NewRequest(request_id, data, settings, max_tokens, stops, 0.0, deadline_s, leader)
        )

    def step(self):
        for message in self.core.step():
            if not isinstance(message, StepOutput):
                self.answers.append(message)
                continue
            self.stats.append(message.stats)
            for delta in message.deltas:
                self._collect(delta)

    def run(self):
        while not self.core.is_idle:
            self.step()
        return self.got

    def tokens(self, request_id):
        return self.got[request_id].token_ids

    def _collect(self, delta):
        collected = self.got.setdefault(delta.id, Collected())
        collected.token_ids += delta.token_ids
        collected.logprobs += delta.logprobs or []
        collected.prompt_logprobs += delta.prompt_logprobs or []
        collected.last = delta
        if delta.finish is not None:
            collected.finish.append(delta.finish)


@pytest.fixture(scope="session")
def world_class():
    return World


@pytest.fixture
def make_world(tiny_llama):
    """A factory of worlds on the tiny Llama."""
    return lambda **settings: World(tiny_llama.path, **settings)


@pytest.fixture(scope="session")
def prompts():
    """A dozen prompts of 1 to 90 tokens; some begin alike."""
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 199, 40).tolist()
    plain = [rng.integers(3, 199, n).tolist() for n in (1, 2, 15, 16, 17, 33, 64, 90)]
    return plain + [shared + rng.integers(3, 199, n).tolist() for n in (1, 8, 20, 40)]
