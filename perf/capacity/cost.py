"""How long a step takes: by the roofline and two assumed efficiencies, or as it was measured.

    roofline    products + attention + a fixed part, each of the two the larger of
                bytes / (bandwidth * memory efficiency), flops / (matmul rate * matmul efficiency)
    measured    c0 + c1 * prefill tokens + c2 * decodes + c3 * context tokens, fitted to real steps

Products read each weight once a step. Attention reads, in each layer, the KV of the tokens that the
layer sees, once: all in context, or with a sliding window the last ones. What is swapped crosses
the link to the host while nothing else happens: a step begins with its moves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millrace.engine.errors import InvalidRequest
from millrace.perf.capacity.hardware import Gpu
from millrace.perf.capacity.shape import ModelShape
from millrace.perf.sim.device import Roughness
from millrace.perf.sim.load import Attended, Load

Costs = tuple[float, float, float, float]
NUM_COSTS = 4  # of a measured step
STALL = 2.0  # times what was expected


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What nobody has measured. They scale a data sheet down to what kernels reach."""

    memory_efficiency: float = 0.8  # of the memory's bandwidth and of the link's
    matmul_efficiency: float = 0.6
    step_overhead_s: float = 100e-6  # sampling, the small kernels, the gaps between them
    reserved_bytes: float = 3e9  # graphs, workspaces and the largest step's activations


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a GPU."""

    shape: ModelShape
    gpu: Gpu
    weight_bytes: float  # of an element
    kv_bytes: float
    assumed: Assumptions
    block_size: int  # tokens

    def __call__(self, load: Load) -> float:
        """Seconds of a step. `load` has the model's windows counted, all of them."""
        shape = self.shape
        read = self.weight_bytes * (shape.layer_elements + shape.head_elements)
        rows = shape.layer_elements * load.tokens + shape.head_elements * load.samples
        attention_s = sum(
            count / len(shape.windows) * self._attention_s(_attended(load, width))
            for width, count in shape.layers_by_width.items()
        )
        moves_s = load.swapped_blocks * self.block_copy_s
        products_s = self._roof_s(read, 2.0 * rows)
        return products_s + attention_s + moves_s + self.assumed.step_overhead_s

    @property
    def block_bytes(self) -> float:
        """KV of one block, all layers."""
        return self.kv_bytes * self.shape.kv_elements_per_token * self.block_size

    @property
    def block_copy_s(self) -> float:
        """Seconds that a block takes to the host, or back."""
        return self.block_bytes / (self.gpu.link_bytes_per_s * self.assumed.memory_efficiency)

    def kv_pool_bytes(self, memory_fraction: float) -> float:
        """What weights and the reserve leave; negative where they do not fit."""
        weights = self.weight_bytes * self.shape.elements
        return self.gpu.memory_bytes * memory_fraction - weights - self.assumed.reserved_bytes

    def _attention_s(self, attended: Load | Attended) -> float:
        """If all layers saw as much."""
        context = attended.context_tokens + attended.prefill_context_tokens
        pairs = attended.context_tokens + attended.prefill_pairs
        read = self.kv_bytes * self.shape.kv_elements_per_token * context
        return self._roof_s(read, self.shape.attention_flops_per_pair * pairs)

    def _roof_s(self, num_bytes: float, flops: float) -> float:
        memory_s = num_bytes / (self.gpu.bytes_per_s * self.assumed.memory_efficiency)
        matmul_s = flops / (self.gpu.flops_per_s * self.assumed.matmul_efficiency)
        return max(memory_s, matmul_s)


def _attended(load: Load, width: int | None) -> Load | Attended:
    """What a layer that sees so far back reads."""
    if width is None:
        return load
    return next(attended for attended in load.windowed if attended.width == width)


@dataclass(frozen=True, slots=True)
class Measured:
    """A server's steps as they were measured, and what else the planner must know of it."""

    model: str
    device: str
    num_blocks: int
    block_size: int
    max_context: int
    run_ahead: int
    costs_s: Costs  # a step, a prefill token, a decode, a context token
    sigma: float  # of the logarithm of measured over fitted
    num_steps: int  # that were fitted

    def __call__(self, load: Load) -> float:
        """Seconds of a step."""
        pairs = zip(self.costs_s, _row(load), strict=True)
        return sum(cost * amount for cost, amount in pairs)

    @property
    def roughness(self) -> Roughness:
        return Roughness(self.sigma)


def load_measured(path: Path) -> Measured:
    """Read what `perf.capacity.validate` wrote; InvalidRequest where it is no such file."""
    limit = 'JSON with "measured": costs_s, sigma, num_blocks and the rest'
    try:
        whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = whole["measured"]
        measured = Measured(**found | {"costs_s": tuple(map(float, found["costs_s"]))})
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"measured file {path}: {type(error).__name__}: {error}"
        raise InvalidRequest(message, "measured", limit) from error
    if len(measured.costs_s) != NUM_COSTS or min(measured.costs_s) < 0.0:
        raise InvalidRequest(f"measured file {path}: costs_s", "measured", "four, none negative")
    return measured


def _row(load: Load) -> tuple[float, ...]:
    return (1.0, load.prefill_tokens, load.decodes, load.context_tokens)


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> tuple[Costs, float]:
    """(costs, sigma): least squares of the relative error; no cost is negative.

    A cost that would be negative is left out and the others are fitted again. Steps that took more
    than twice what was expected were stalls of the machine: they are left out of a second round.
    """
    rows = np.array([_row(load) for load in loads])
    times = np.asarray(seconds)
    costs = _least_squares(rows, times)
    usual = times < STALL * (rows @ costs)
    costs = _least_squares(rows[usual], times[usual])
    residuals = np.log(times[usual] / (rows[usual] @ costs))
    step, prefill, decode, context = costs.tolist()
    return (step, prefill, decode, context), float(residuals.std())


def _least_squares(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    kept = np.flatnonzero(rows.any(axis=0))  # a load that never came costs nothing that is known
    while True:
        scaled = rows[:, kept] / times[:, None]
        solution = np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]
        if (solution >= 0.0).all():
            costs = np.zeros(rows.shape[1])
            costs[kept] = solution
            return costs
        kept = np.delete(kept, solution.argmin())
