"""The device that a measurement was taken on; goes into its environment beside `environment.py`."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
PEERS = ("xformers", "flashinfer-python")


def device_facts(device: torch.device) -> dict[str, str | int | float | None]:
    """Name, size and clocks as the driver tells them; on a CPU only its type."""
    found: dict[str, str | int | float | None] = {"device": device.type}
    found |= {name: _version(name) for name in PEERS}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found["device"] = properties.name
    found["capability"] = f"{properties.major}.{properties.minor}"
    found["multiprocessors"] = properties.multi_processor_count
    found["l2_bytes"] = properties.L2_cache_size
    found["memory_bytes"] = properties.total_memory
    found["cuda"] = torch.version.cuda
    return found | _from_smi()


def _from_smi() -> dict[str, str]:
    """What only nvidia-smi tells, at this moment; nothing where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = answer.stdout.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(SMI_FIELDS, values, strict=True)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
