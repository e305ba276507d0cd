"""Peers in processes of their own: what goes in and out, and every way in which one can end.

vLLM itself is not needed: a stand-in of that name takes what the real one takes.
"""

import sys
import time

import pytest
import torch

from millrace.perf.e2e import vllm as vllm_part
from millrace.perf.kernels.session import Session, Skip
from millrace.perf.peers.process import PeerFailed, PeerProcess
from millrace.perf.peers.vllm_peer import Size, vllm_peer
from millrace.perf.random_model import TINY

LONG_S = 600.0
STAND_IN = """
import json, os
from types import SimpleNamespace as Made
__version__ = "0.0-stand-in"
class SamplingParams:
    def __init__(self, **options):
        assert options["temperature"] == 0.0 and options["ignore_eos"], options
        assert options["min_tokens"] == options["max_tokens"]
        self.count = options["max_tokens"]
class LLM:
    def __init__(self, model, dtype, load_format, skip_tokenizer_init, max_model_len, **others):
        print("a line that is no answer")
        assert (load_format, skip_tokenizer_init) == ("dummy", True)
        assert json.load(open(model + "/config.json"))["hidden_size"] == 64
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert dtype == "float32" and not others["enable_prefix_caching"]
        self.context = max_model_len
    def generate(self, inputs, params, use_tqdm):
        for prompt in inputs:
            assert len(prompt["prompt_token_ids"]) + params.count <= self.context
        return [Made(outputs=[Made(token_ids=[7] * params.count)]) for _ in inputs]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A vLLM of no model, for the processes that a test starts."""
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_vllm_is_asked_for_the_shape_the_prompts_and_exactly_so_many_tokens(stand_in):
    with vllm_peer(sys.executable, TINY, "float32", Size(2, 8)) as peer:
        assert peer.about == {"version": "0.0-stand-in"}
        assert peer.measure([[1, 2, 3], [4, 5, 6]], 5) > 0
        with pytest.raises(PeerFailed, match="AssertionError"):
            peer.measure([[1, 2, 3]], 6)  # longer than it was made for: the process ends


def test_a_peer_that_is_not_there_says_so():
    missing = "import nowhere_to_be_found"
    with pytest.raises(PeerFailed, match=r"exit code 1: .*nowhere_to_be_found"):
        PeerProcess([sys.executable, "-c", missing]).__enter__()


def test_a_peer_that_hangs_is_killed_at_its_limit():
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(PeerFailed, match="killed after 0 s"):
        PeerProcess(hanging, limit_s=0.2).__enter__()


def test_missing_tokens_are_no_measurement():
    answer = """
import sys
print("{}", flush=True)
for line in sys.stdin:
    print('{"output_tokens": 3, "seconds": 1.0}', flush=True)
"""
    with PeerProcess([sys.executable, "-c", answer]) as peer:
        assert peer.measure([[1]], 3) == 3.0
        with pytest.raises(PeerFailed, match="3 tokens came of 2 x 2"):
            peer.measure([[1], [2]], 2)


def a_session(record, **changes):
    deadline = time.monotonic() + LONG_S
    return Session(torch.device("cpu"), True, 0, deadline, record, **changes)


def test_the_suites_part_has_a_row_for_each_shape_and_number_of_streams(stand_in, monkeypatch):
    rows = []
    monkeypatch.setattr(vllm_part, "find_spec", lambda name: name)
    vllm_part.run(a_session(rows.append))
    ends = [(row["case"].partition(", ")[2], row["status"]) for row in rows]
    a_shape = [("1 at once", "measured"), ("3 at once", "measured"), ("start", "measured")]
    assert ends == a_shape * 2


def test_the_suites_part_is_skipped_where_there_is_no_vllm(monkeypatch):
    monkeypatch.setattr(vllm_part, "find_spec", lambda name: None)
    with pytest.raises(Skip, match="not installed"):
        vllm_part.run(a_session(print))
