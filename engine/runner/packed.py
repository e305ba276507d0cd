"""PackedArrays: named arrays side by side in one buffer, so that one copy moves all of them.

    |0          |16               |48      |        offsets are multiples of ALIGNMENT, so that
    | slots i64 | temperature f32 | ...    |        every array can be viewed in its own dtype

Packed by NumPy on the host; on the device each array is a view of the buffer that arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16  # bytes; the largest vector load
DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint8): torch.uint8,
}


@dataclass(slots=True)
class PackedArrays:
    """Arrays by name, and where each lies in the buffer."""

    _arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        """Append an array; it is read when `write` is called, not before."""
        assert name not in self._arrays and array.dtype in DTYPES, name
        self._arrays[name] = array
        self._offsets[name] = self.num_bytes
        self.num_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT

    def write(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Copy every array to its place in a buffer of at least `num_bytes` bytes."""
        for name, array in self._arrays.items():
            offset = self._offsets[name]
            place = buffer[offset : offset + array.nbytes].view(array.dtype)
            place[:] = array.reshape(-1)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays inside a uint8 tensor that holds the packed bytes."""
        found = {}
        for name, array in self._arrays.items():
            offset = self._offsets[name]
            flat = buffer[offset : offset + array.nbytes].view(DTYPES[array.dtype])
            found[name] = flat.view(array.shape)
        return found
