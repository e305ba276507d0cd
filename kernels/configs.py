"""Launch configurations: tile sizes, warps and stages of a kernel, by device.

Chosen offline by `python -m millrace.perf.kernels.tune` and kept in configs.json with what was
measured; never while serving, where the noise of a timing would decide the bits of a result. The
key of a row is a shape that a model fixes (head dimension, weight shape), never a number of tokens.
What the file does not have for a device, the kernel's own default is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

FILE = Path(__file__).parent / "configs.json"
UNFUSED = {"enable_fp_fusion": False}
"""How a kernel is launched in which a + b * c has to round alike whatever the layout of a tile: the
compiler makes no fused multiply-add that the kernel does not spell out."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How a kernel is launched; `constants` are its tile sizes by the kernel's own names."""

    num_warps: int
    num_stages: int
    constants: Mapping[str, int]

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told besides the constants. With those, it is a part of a binary's key."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def launch_config(
    op: str, key: str, device: torch.device, default: LaunchConfig, file: Path = FILE
) -> LaunchConfig:
    """The row of `op` and `key` for this device, else `default`; constants it lacks are default's.

    Example: launch_config("paged_attention", "bfloat16 D128", torch.device("cuda"), DEFAULT).
    """
    if device.type != "cuda":
        return default
    row = _rows(file).get((torch.cuda.get_device_name(device), op, key))
    if row is None:
        return default
    return replace(row, constants={**default.constants, **row.constants})


@cache
def _rows(file: Path) -> Mapping[tuple[str, str, str], LaunchConfig]:
    """(device, op, key) -> configuration."""
    devices: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(file.read_text())
    return MappingProxyType(
        {
            (device, op, key): LaunchConfig(row["num_warps"], row["num_stages"], row["constants"])
            for device, ops in devices.items()
            for op, keys in ops.items()
            for key, row in keys.items()
        }
    )
