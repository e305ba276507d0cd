"""The grid of a decode product: full, fixed by the weight's shape, without an empty split."""

import math

import pytest
import torch

from millrace.kernels import matmul_plan
from millrace.kernels.matmul_plan import BLOCK_K, MIN_FILL, SMS, decode_config, plan, split_length

LLAMA = {  # weight [N, K] -> (tiles, splits)
    "1B qkv": (3072, 2048, 48, 4),
    "1B o": (2048, 2048, 32, 4),
    "1B gate_up": (16384, 2048, 256, 1),
    "1B down": (2048, 8192, 32, 4),
    "1B head": (128256, 2048, 2004, 1),
    "8B qkv": (6144, 4096, 96, 4),
    "8B o": (4096, 4096, 64, 2),
    "8B gate_up": (28672, 4096, 448, 2),
    "8B down": (4096, 14336, 64, 2),
    "8B head": (128256, 4096, 2004, 1),
    "70B/8 qkv": (1280, 8192, 20, 6),
    "70B/8 o": (8192, 1024, 128, 1),
    "70B/8 gate_up": (7168, 8192, 112, 2),
    "70B/8 down": (8192, 3584, 128, 1),
    "70B/8 head": (16032, 8192, 251, 1),
}


@pytest.mark.parametrize("name", LLAMA)
def test_the_shapes_of_llama_fill_the_device(name):
    n, k, tiles, splits = LLAMA[name]
    found = plan(n, k)
    assert (found.tiles, found.splits) == (tiles, splits)
    assert found.blocks >= MIN_FILL * SMS


@pytest.mark.parametrize("k", [1, 128, 129, 576, 640, 1152, 3584, 14336])
@pytest.mark.parametrize("n", [1, 64, 65, 576, 4096, 50000])
def test_splits_cover_k_and_none_is_empty(n, k):
    splits = plan(n, k).splits
    length = split_length(k, splits, BLOCK_K)
    assert length % BLOCK_K == 0
    assert (splits - 1) * length < k <= splits * length
    assert plan(n, k).tiles == math.ceil(n / 64)


def test_a_measured_row_overrides_the_plan(monkeypatch):
    weight, asked = torch.empty(4096, 14336, dtype=torch.bfloat16, device="meta"), []
    monkeypatch.setattr(matmul_plan, "launch_config", lambda *of: asked.append(of) or "row")
    assert decode_config(weight) == "row"
    op, key, _, default = asked[0]
    assert (op, key) == ("linear_decode", "bfloat16 N4096 K14336")
    tiles = {"BLOCK_N": 64, "BLOCK_K": 128, "SPLITS": 2}
    assert default.constants == {**tiles, "PDL": 0, "TMA": 0}
