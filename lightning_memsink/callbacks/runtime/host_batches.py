"""A batch as its loader gave it, in host memory, read in the place of the one that a step gets on a device.

To read a number of a tensor on a device, the host waits for all that the device still has to do.
"""

from __future__ import annotations

from collections import UserDict
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import is_on_host, parts_of, tensors_in
from lightning_memsink.samples.row_order import elements_of

FIRST, EVERY = 8, 64
"""Batches that are read on their device at the start, which waits, and how often later."""
TENSORS = 16
"""Tensors of a batch that are compared at most."""


def kept(batch: Any) -> Any:
    """A batch to be read later: hooks may put other tensors into its mapping, or move them within it."""
    return dict(batch.items()) if isinstance(batch, (dict, UserDict)) else batch


class HostBatches:
    """Those of one loop. Hooks between the loader and the step may change a batch: then it is not read any more.

    Names, shapes and dtypes are compared in every step. So are elements of each row: in the first steps at once, later
    on the device, where the answer stays until someone takes it.
    """

    def __init__(self) -> None:
        self._is_trusted = True
        self._compared = 0

    @property
    def is_settled(self) -> bool:
        """Whether the comparison of the next batch doesn't wait."""
        return self._compared >= FIRST

    def distrust(self) -> None:
        """From now on batches are read where the step has them."""
        self._is_trusted = False

    def of(self, batch: Any, host: Any) -> Any | None:
        """``host``, if it can be read in the place of ``batch``, which lies on a device; else None."""
        if not self._is_trusted or host is None or is_on_host(batch):
            return None
        return host if _are_alike(host, batch) else None

    def reading(self, batch: Any, host: Any | None) -> tuple[Any, Tensor | None]:
        """What to read of ``batch``: ``host``, as `of` gave it, or itself; and what `compare` leaves open."""
        answer = False if host is None else self.compare(batch, host)
        if answer is False:
            return batch, None
        return host, answer if isinstance(answer, Tensor) else None

    def admits(self, is_same: Tensor | None) -> bool:
        """Whether a batch counts whose open answer has arrived in host memory; None if it was never open. One that was
        read wrong does not, and no other batch is read so."""
        if is_same is None or bool(is_same):
            return True
        self.distrust()
        return False

    @torch.no_grad()
    def compare(self, batch: Any, host: Any) -> Tensor | bool:
        """Whether elements of the rows of both are equal: a number in the first steps, a bool tensor ``[]`` later."""
        try:
            answer = _all_equal(host, batch)
        except Exception:  # an odd batch must not end the training: it is read where the step has it
            self.distrust()
            return False
        self._compared += 1
        if self._compared > FIRST:
            return answer
        self._is_trusted = bool(answer)
        return self._is_trusted


def _all_equal(host: Any, batch: Any) -> Tensor:
    pairs = zip(tensors_in(host), tensors_in(batch), strict=True)
    answers = [_are_equal(here, there) for here, there in islice(pairs, TENSORS) if here is not there]
    return torch.stack([each.to(answers[-1].device) for each in answers]).all() if answers else torch.tensor(True)


def _are_alike(host: Any, batch: Any) -> bool:
    """Whether two batches have the same parts, but for the device of tensors and their values."""
    if isinstance(host, Tensor) or isinstance(batch, Tensor):
        both = isinstance(host, Tensor) and isinstance(batch, Tensor) and host.is_cpu and not host.is_nested
        return both and not batch.is_nested and host.shape == batch.shape and host.dtype == batch.dtype
    own, other = parts_of(host), parts_of(batch)
    if own is None or other is None:
        return own is None and other is None and _is_same(host, batch)
    names = [name for name, _ in own] == [name for name, _ in other]
    return names and all(_are_alike(a, b) for (_, a), (_, b) in zip(own, other, strict=True))


def _is_same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # things that can't be compared
        return False


def _are_equal(here: Tensor, there: Tensor) -> Tensor:
    """Bool ``[]`` on the device of ``there``: whether some elements of each row are the same, NaN as NaN."""
    if not here.ndim:
        before, now = here, there
    else:
        before, now = elements_of(here, 0), elements_of(there, 0)
    before = before.to(there.device, non_blocking=True)
    return ((before == now) | ((before != before) & (now != now))).all()
