"""How the work of y[T, N] = x[T, K] @ weight[N, K]^T is cut for a decode step, from N and K alone.

A decode step has few rows, so its time is that of streaming the weight, if every multiprocessor
streams its share. A program takes BLOCK_N rows of the weight and one of `splits` ranges of K. 4096
rows make 64 tiles, which leave half of an H200's 132 multiprocessors idle; 2 splits make 128.

`splits` is a part of a result's bits (partial sums are added in ascending order), so it may depend
on the weight's shape and never on T. It does not ask for the device either: SMS is a constant, and
what another part prefers is a row of configs.json.

The choice is the least cost in steps of BLOCK_K for the busiest multiprocessor,

    ceil(tiles * splits / SMS) * (ceil(steps / splits) + START + (MERGE if splits > 1))

among grids of at least MIN_FILL programs a multiprocessor, where START and MERGE stand for what a
program pays to fill its pipeline and to hand over its partial sum. They are estimates: a measured
row overrides them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.configs import LaunchConfig, launch_config

SMS = 132  # multiprocessors of an H100 or H200
BLOCK_N = 64  # rows of the smallest warp-group matrix instruction
BLOCK_K = 128
MAX_SPLITS = 8  # the last program to arrive reads them all
MIN_FILL = 0.9
START, MERGE = 1, 1
MAX_ROWS = 64  # of x, that the decode product takes


@dataclass(frozen=True, slots=True)
class Plan:
    """The grid of a decode product: tiles * splits programs."""

    tiles: int
    splits: int

    @property
    def blocks(self) -> int:
        return self.tiles * self.splits


def plan(n: int, k: int) -> Plan:
    """The grid for a weight [n, k]; no split is empty. plan(4096, 4096) is 64 tiles x 2."""
    tiles, steps = math.ceil(n / BLOCK_N), math.ceil(k / BLOCK_K)
    choices = {math.ceil(steps / math.ceil(steps / s)) for s in range(1, MAX_SPLITS + 1)}
    filling = [s for s in choices if tiles * s >= MIN_FILL * SMS] or [max(choices)]
    return Plan(tiles, min(filling, key=lambda s: (_cost(tiles, steps, s), s)))


def decode_config(weight: Tensor) -> LaunchConfig:
    """How the decode product of `weight` is launched: its row in configs.json, else the plan."""
    n, k = weight.shape
    tiles = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "SPLITS": plan(n, k).splits}
    constants = {**tiles, "PDL": 0, "TMA": 0}
    default = LaunchConfig(num_warps=4, num_stages=default_stages(weight), constants=constants)
    return launch_config("linear_decode", weight_key(weight), weight.device, default)


def weight_key(weight: Tensor) -> str:
    """The key of a weight's row in configs.json. Example: "bfloat16 N4096 K14336"."""
    n, k = weight.shape
    return f"{str(weight.dtype).removeprefix('torch.')} N{n} K{k}"


def split_length(k: int, splits: int, block_k: int) -> int:
    """Columns of a split, whole steps of block_k: split s is [s * length, (s + 1) * length)."""
    return math.ceil(math.ceil(k / block_k) / splits) * block_k


def default_stages(weight: Tensor) -> int:
    """Steps in flight: 4 keep 64 KiB of 16-bit weights on their way. Two of float32, and two in
    AMD's 64 KiB of shared memory."""
    return 2 if torch.version.hip or weight.element_size() > 2 else 4


def _cost(tiles: int, steps: int, splits: int) -> int:
    merge = MERGE if splits > 1 else 0
    return math.ceil(tiles * splits / SMS) * (math.ceil(steps / splits) + START + merge)
