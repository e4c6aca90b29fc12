"""Tensors on their way from the device to the host, beside the next pass: a side stream and pinned memory on CUDA."""

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BUFFERS = 3  # batches that may be on their way or wait to be written


@dataclass
class Moving:
    """Tensors that are being moved; made by `Mover`."""

    tensors: Mapping[str, torch.Tensor]
    _arrived: Any = None
    _buffer: torch.Tensor | None = None
    _free: queue.Queue | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait until they are there; bfloat16 comes as its bits, uint16. Theirs until ``release``."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {
            name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
            for name, tensor in self.tensors.items()
        }

    def release(self) -> None:
        """Say that the arrays are no longer needed."""
        if self._free is not None:
            self._free.put(self._buffer)


class Mover:
    """Moves tensors of one device to the host; on a CPU they are there already.

    Page-locked buffers are used again: to lock memory takes longer than to fill it. ``move`` waits while all of them
    are on their way or in use, which bounds what waits for the disk.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._free: queue.Queue = queue.Queue()
        if self.cuda:
            self._stream = torch.cuda.Stream(device)
            for _ in range(BUFFERS):
                self._free.put(torch.empty(0, dtype=torch.uint8, pin_memory=True))

    def move(self, tensors: Mapping[str, torch.Tensor], wait: Callable[[queue.Queue], torch.Tensor]) -> Moving:
        """Begin to move ``tensors``, which the current stream is computing; ``wait`` gets a buffer that is free."""
        if not self.cuda:
            return Moving(tensors)
        buffer = wait(self._free)
        # Every tensor begins at a multiple of 16 bytes.
        sizes = [-(-tensor.nbytes // 16) * 16 for tensor in tensors.values()]
        if buffer.numel() < sum(sizes):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        moved, start = {}, 0
        with torch.cuda.stream(self._stream):
            for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
                moved[name] = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                moved[name].copy_(tensor, non_blocking=True)
                # Its memory must not be given to the next pass before it is copied.
                tensor.record_stream(self._stream)
                start += size
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return Moving(moved, arrived, buffer, self._free)
