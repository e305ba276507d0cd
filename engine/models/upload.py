"""Weights from a mapped file to a device.

A GPU reads pageable memory slowly and a mapped file page by page. So each loading thread copies its
tensors through a pair of pinned buffers: while the device fetches one, the thread fills the other
from the file (which is where it waits for the disk, beside the other threads).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch

CHUNK_BYTES = 32 * 2**20  # a pinned buffer; large enough that a copy's start costs nothing
NUM_BUFFERS = 2


class Event(Protocol):
    """A mark in the device's queue of work; torch.cuda.Event is one."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Uploader:
    """Moves tensors to one device; may be shared by threads, each of which has its own buffers."""

    def __init__(
        self,
        device: torch.device,
        pin: Callable[[int], torch.Tensor],
        make_event: Callable[[], Event],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._device = device
        self._pin = pin
        self._make_event = make_event
        self._chunk_bytes = chunk_bytes
        self._of_thread = threading.local()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, complete in the order of its queue; itself if it is there."""
        if tensor.device == self._device:
            return tensor
        buffers: list[tuple[torch.Tensor, Event]] = getattr(self._of_thread, "buffers", [])
        if not buffers:
            buffers += [
                (self._pin(self._chunk_bytes), self._make_event()) for _ in range(NUM_BUFFERS)
            ]
            self._of_thread.buffers = buffers
        arrived = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source = tensor.contiguous().view(-1).view(torch.uint8)
        target = arrived.view(-1).view(torch.uint8)
        for turn, start in enumerate(range(0, source.numel(), self._chunk_bytes)):
            buffer, event = buffers[turn % NUM_BUFFERS]
            event.synchronize()
            part = source[start : start + self._chunk_bytes]
            staged = buffer[: part.numel()]
            staged.copy_(part)
            target[start : start + part.numel()].copy_(staged, non_blocking=True)
            event.record()
        return arrived


def uploader(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """How tensors of a checkpoint get to a device; on a CPU they are there."""
    if device.type != "cuda":
        return lambda tensor: tensor

    def pin(num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    return Uploader(device, pin, torch.cuda.Event)
