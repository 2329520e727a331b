"""The documents in batches of a callback that has no `LossTracker` to read them."""

from __future__ import annotations

from typing import Any

from lightning_memsink.callbacks.runtime.host_batches import EVERY, FIRST
from lightning_memsink.samples.batch import is_on_host, leaves
from lightning_memsink.samples.documents import Documents, documents_in


class PackedBatches:
    """Reads documents in the first batches of each kind and now and then; in all, once any had some.

    Reading a batch on a device waits for it. One in host memory is always read.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, int] = {}
        self._has_documents = False

    def documents_in(self, batch: Any) -> Documents | None:
        if is_on_host(batch):
            return documents_in(batch)
        kind = tuple((path, tensor.ndim, tensor.dtype) for path, tensor in leaves(batch))
        self._seen[kind] = seen = self._seen.get(kind, 0) + 1
        if not self._has_documents and seen > FIRST and seen % EVERY:
            return None
        found = documents_in(batch)
        self._has_documents |= found is not None
        return found
