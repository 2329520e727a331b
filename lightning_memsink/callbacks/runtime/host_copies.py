"""Values of training steps on their way from the device to the host, for which no step waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_memsink._host_copy import HostCopy

MOST = 64
"""Calls of `put` after which `advance` goes by itself, so that few tensors lie on the device."""


class _Waiting(NamedTuple):
    """Small tensors, some of them on the device, and what takes them in host memory."""

    use: Callable[..., None]
    values: tuple[Tensor | None, ...]


class HostCopies:
    """A queue of small tensors, handed on in order. What lies in host memory is handed on at once, if nothing waits.

    The rest stays on its device. `advance` copies all of it in one go for each dtype, without waiting, and hands on
    what the previous `advance` has sent: that has arrived long since. `drain` hands on everything, and waits.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._sent: _Sent | None = None

    def __len__(self) -> int:
        """How many are not handed on yet."""
        return len(self._waiting) + (0 if self._sent is None else len(self._sent.waiting))

    @property
    def is_ready(self) -> bool:
        """Whether `advance` waits for nothing."""
        return self._sent is None or self._sent.copy.is_ready

    def put(self, use: Callable[..., None], *values: Tensor | None) -> None:
        """Has ``use`` called with the ``values`` in host memory, in time. They may change after this call."""
        if not len(self) and all(value is None or value.is_cpu for value in values):
            use(*values)
            return
        if len(self._waiting) >= MOST:
            self.advance()
        # A CUDA graph writes to the same memory at every replay.
        self._waiting.append(
            _Waiting(use, tuple(None if value is None else value.detach().clone() for value in values))
        )

    def advance(self) -> None:
        """Hands on what was sent before, and sends what has come since."""
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.hand_on()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            values = [value for _, some in waiting for value in some if value is not None]
            self._sent = _Sent(waiting, HostCopy(values))

    def drain(self) -> None:
        """Hands on everything. Waits for the device."""
        self.advance()
        self.advance()

    def clear(self) -> None:
        """Forgets everything."""
        self._waiting, self._sent = [], None


class _Sent(NamedTuple):
    """What waits for a copy that was begun."""

    waiting: Sequence[_Waiting]
    copy: HostCopy

    def hand_on(self) -> None:
        arrived = iter(self.copy.values())
        for use, values in self.waiting:
            use(*(None if value is None else next(arrived).clone() for value in values))
