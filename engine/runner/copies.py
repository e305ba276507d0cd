"""Copies between host and device that neither side waits for.

A copy from or to pinned memory goes on while the host works, so its host buffer must not be touched
until the device says that it is done. Buffers therefore come from rings deeper than the steps in
flight, and each has an event: whoever takes a buffer again waits for that event, which has long
passed unless the ring is too short. On a CPU, host and device are one memory: a copy is done when
the call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from millrace.engine.runner.packed import PackedArrays

MIN_BUFFER_BYTES = 4096


class Event(Protocol):
    """A mark in the device's queue of work; torch.cuda.Event is one."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Arrival(Protocol):
    """A tensor on its way to the host."""

    def wait(self) -> npt.NDArray[np.int64]:
        """Wait for it; to be called once."""


class Copies(Protocol):
    """What the runner needs of either kind of memory."""

    def send(self, packed: PackedArrays) -> torch.Tensor:
        """The packed bytes as a uint8 tensor on the device, in the order of its queue."""

    def fetch(self, tensor: torch.Tensor) -> Arrival:
        """Copy an i64 tensor as it is at this point of the queue; it may be overwritten after."""

    def settle(self) -> None:
        """Wait for all that is queued; raises if the device cannot do it any more."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Of a CPU: it is here."""

    values: npt.NDArray[np.int64]

    def wait(self) -> npt.NDArray[np.int64]:
        return self.values


class SharedMemory:
    """Copies where host and device are the same memory."""

    def send(self, packed: PackedArrays) -> torch.Tensor:
        buffer = np.empty(packed.num_bytes, np.uint8)
        packed.write(buffer)
        return torch.from_numpy(buffer)

    def fetch(self, tensor: torch.Tensor) -> Arrived:
        return Arrived(tensor.clone().numpy())

    def settle(self) -> None:
        """There is no queue."""


@dataclass(slots=True)
class Staging:
    """One pinned buffer of a ring, and the event after the last copy that used it."""

    buffer: torch.Tensor  # uint8
    event: Event


@dataclass(frozen=True, slots=True)
class OnItsWay:
    """A tensor being copied into a staging buffer, which is its own until it has been read."""

    staging: Staging
    shape: torch.Size

    def wait(self) -> npt.NDArray[np.int64]:
        self.staging.event.synchronize()
        flat = self.staging.buffer[: self.shape.numel() * 8].view(torch.int64)
        return flat.view(self.shape).numpy().copy()


class PinnedCopies:
    """Copies through two rings of pinned buffers, one for each direction.

    `depth` buffers each: one more than steps can be in flight. Those for fetches hold `fetch_bytes`
    from the start. `pin` makes a buffer of so many bytes and `make_event` an event; tests give
    their own.
    """

    def __init__(
        self,
        device: torch.device,
        depth: int,
        pin: Callable[[int], torch.Tensor],
        make_event: Callable[[], Event],
        fetch_bytes: int = MIN_BUFFER_BYTES,
    ) -> None:
        self._device = device
        self._pin = pin
        self._make_event = make_event
        self._rings = {
            way: [Staging(pin(num_bytes), make_event()) for _ in range(depth)]
            for way, num_bytes in (("send", MIN_BUFFER_BYTES), ("fetch", fetch_bytes))
        }
        self._turns = dict.fromkeys(self._rings, 0)

    def send(self, packed: PackedArrays) -> torch.Tensor:
        staging = self._take("send", packed.num_bytes)
        packed.write(staging.buffer.numpy())
        arrived = torch.empty(packed.num_bytes, dtype=torch.uint8, device=self._device)
        arrived.copy_(staging.buffer[: packed.num_bytes], non_blocking=True)
        staging.event.record()
        return arrived

    def fetch(self, tensor: torch.Tensor) -> OnItsWay:
        staging = self._take("fetch", tensor.numel() * 8)
        place = staging.buffer[: tensor.numel() * 8].view(torch.int64).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        staging.event.record()
        return OnItsWay(staging, tensor.shape)

    def settle(self) -> None:
        event = self._make_event()
        event.record()
        event.synchronize()

    def _take(self, way: str, num_bytes: int) -> Staging:
        """The ring's next buffer, with room for so many bytes, once its last copy is done."""
        ring = self._rings[way]
        staging = ring[self._turns[way] % len(ring)]
        self._turns[way] += 1
        staging.event.synchronize()
        if staging.buffer.numel() < num_bytes:
            staging.buffer = self._pin(1 << (num_bytes - 1).bit_length())
        return staging


def copies_for(device: torch.device, steps_in_flight: int, fetch_bytes: int) -> Copies:
    """The copies of a device on which so many steps can be in flight, that fetch so much each."""
    if device.type != "cuda":
        return SharedMemory()

    def pin(num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    return PinnedCopies(device, steps_in_flight + 1, pin, torch.cuda.Event, fetch_bytes)
