"""ForwardBatch and KVCache: everything that a forward pass reads, as arguments.

Letters: L layers, T tokens of the step, R rows (one a request), S slots, B blocks, P tokens per
block, G KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from millrace.kernels.attention import AttentionBatch


@dataclass(frozen=True, slots=True)
class KVCache:
    """By layer, K and V each [B, P, G, D]: one layout for every backend.

    All of them are parts of one tensor, so that whole blocks can be moved at once.
    """

    storage: torch.Tensor  # [L, 2, B, P, G, D]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """`shape` is (B, P, G, D). Memory is touched (and so taken) as blocks are written."""
        storage = torch.empty((num_layers, 2, *shape), dtype=dtype, device=device)
        keys, values = storage.unbind(1)
        return cls(storage, list(keys), list(values))


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One mixed step: decoding rows first, one token each, then the prefill chunks' rows.

    Example, P = 16: slot 5 decodes position 32 and slot 2 prefills positions 0..3.

        token_ids [a, p0, p1, p2, p3]      positions [32, 0, 1, 2, 3]
        attention.slots [5, 2]             attention.query_start [0, 1, 5]
        attention.context_lens [33, 4]     attention.num_decodes 1
        write_index [table[5][2] * 16 + 0, table[2][0] * 16 + 0, ... + 3]
    """

    token_ids: torch.Tensor  # i64 [T]
    positions: torch.Tensor  # i64 [T]
    write_index: torch.Tensor  # i64 [T]: block * P + offset of the token's K and V; padding: -1
    attention: AttentionBatch
