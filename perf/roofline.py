"""The least time that a decode step can take on a device, from what was measured there.

    roof = max(bytes / copy bandwidth, operations / matmul rate)

Bytes: each weight once, and the keys and values of every token in context once. Operations: two for
each weight and row, and four for each element of K (or V) and query head of its group. Logits and
activations are left out: they are small beside these, and a kernel may keep them on the chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millrace.perf.random_model import parameters_read


@dataclass(frozen=True, slots=True)
class StepWork:
    """One decode step of `rows` rows that hold `context` tokens together."""

    bytes: float
    operations: float

    def roof_s(self, bytes_per_s: float, operations_per_s: float) -> float:
        return max(self.bytes / bytes_per_s, self.operations / operations_per_s)


def decode_work(
    config: dict[str, Any], rows: int, context: float, element_bytes: int = 2
) -> StepWork:
    """Of a model with this config.json; weights and cache have elements of one size."""
    weights = parameters_read(config)
    layers, dim = config["num_hidden_layers"], config["head_dim"]
    cache = 2 * layers * config["num_key_value_heads"] * dim * context
    attention = 4 * layers * config["num_attention_heads"] * dim * context
    return StepWork((weights + cache) * element_bytes, 2 * weights * rows + attention)
