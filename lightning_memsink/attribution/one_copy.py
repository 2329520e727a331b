"""Many small tensors of a device, copied to the host at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as float32 on the CPU, in their order. Waits once for each device."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        by_device[tensor.device].append(place)
    found = [tensor.detach().float() for tensor in tensors]
    for device, places in by_device.items():
        if device.type == "cpu":
            continue
        whole = torch.cat([found[place].reshape(-1) for place in places]).cpu()
        parts = whole.split([found[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.reshape(found[place].shape)
    return found
