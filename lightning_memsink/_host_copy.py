"""Many small tensors, copied from their devices to the host at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors, begun here without waiting where that is safe: one for each device and dtype."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for place, tensor in enumerate(self._tensors):
            if not tensor.is_cpu:
                self._places[tensor.device, tensor.dtype].append(place)
        parts = [[self._tensors[place].reshape(-1) for place in places] for places in self._places.values()]
        self._sources = [torch.cat(some) for some in parts]  # must live until the copies are made
        # Elsewhere than on CUDA a copy that doesn't wait may be read too early.
        self._copies = [source.to("cpu", non_blocking=source.is_cuda) for source in self._sources]
        self._events = [
            torch.cuda.current_stream(source.device).record_event() for source in self._sources if source.is_cuda
        ]

    @property
    def is_ready(self) -> bool:
        """Whether `values` waits for nothing."""
        return all(event.query() for event in self._events)

    def values(self) -> list[Tensor]:
        """All tensors in host memory, in their order; those of a device are parts of one. Waits for the copies."""
        for event in self._events:
            event.synchronize()
        found = list(self._tensors)
        for places, copy in zip(self._places.values(), self._copies, strict=True):
            parts = copy.split([found[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                found[place] = part.reshape(found[place].shape)
        return found


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as float32 on the CPU, in their order. Waits once for each device."""
    return HostCopy([tensor.float() for tensor in tensors]).values()
