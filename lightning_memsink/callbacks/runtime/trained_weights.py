"""Whether a validation runs under the weights that the last training step left.

Averaged weights may be copied into the parameters, take the place of their storage, of the parameters themselves or of
whole modules, or belong to a copy of the model that is evaluated instead. All of these are noticed by what the forward
uses, not by the name of a callback: a few elements of each tensor are compared with those of before the validation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_memsink.callbacks.runtime.module_calls import FirstCalls, is_whole, own_tensors, tensors_of

ELEMENTS = 256


def elements(tensor: Tensor) -> Tensor | None:
    """``[K]`` float32, a copy of at most 256 elements spread over ``tensor``, on its device; None if none can be read.

    Of a sharded tensor, elements of this process's shard.
    """
    local = getattr(tensor, "_local_tensor", tensor).detach()
    if local.layout != torch.strided or local.is_meta or not local.numel():
        return None
    flat = (torch.view_as_real(local) if local.is_complex() else local).reshape(-1)
    stride = len(flat) // ELEMENTS | 1  # an even one could stay within a few columns of a matrix
    return flat[::stride][:ELEMENTS].to(torch.float32, copy=True)


def is_shard(tensor: Tensor) -> bool:
    """Whether other processes have other parts of the tensor."""
    return hasattr(tensor, "_local_tensor")


def any_differs(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of any pair are not equal, NaN to NaN. Waits once for each device."""
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for before, now in pairs:
        if before.shape != now.shape or before.device != now.device:
            return True
        by_device.setdefault(now.device, []).append((before, now))
    for some in by_device.values():
        before, now = (torch.cat(parts) for parts in zip(*some, strict=True))
        if not bool(((before == now) | (before.isnan() & now.isnan())).all()):
            return True
    return False


class TrainedWeights:
    """What the model's weights are before a validation, and whether the validation uses these."""

    def __init__(self) -> None:
        self._reference: dict[str, Tensor] = {}
        self._trainable: tuple[str, ...] = ()
        self._shards: frozenset[str] = frozenset()  # a forward sees other tensors than these
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._is_changed = False
        self.is_watched = False
        """Whether a step of the validation that runs was watched."""
        self._in_training, self._in_validation = FirstCalls(), FirstCalls()

    def watch_training(self, model: nn.Module) -> None:
        """Notes which modules the training step calls, up to the first validation. Each costs one call of a hook."""
        self._in_training.wait(model, lambda name, module: None, only_trained=True)

    @torch.no_grad()
    def remember(self, model: nn.Module) -> None:
        """Before a validation, when the weights are those of the last training step."""
        self._in_training.stop()
        self._in_validation.stop()
        self._in_validation = FirstCalls()
        self._pairs, self._is_changed, self.is_watched = [], False, False
        self._trainable = tuple(dict.fromkeys(name for name, tensor in tensors_of(model) if tensor.requires_grad))
        self._shards = frozenset(name for name, tensor in tensors_of(model) if is_shard(tensor))
        read: dict[int, Tensor | None] = {}  # tied tensors have several names
        self._reference = {}
        for name, tensor in tensors_of(model):
            sample = read[id(tensor)] = read[id(tensor)] if id(tensor) in read else elements(tensor)
            if sample is not None:
                self._reference[name] = sample

    def watch_validation(self, model: nn.Module) -> None:
        """Just before a validation step: compares the parameters now, and again as the step's forward uses them."""
        self._compare_trainable(model)
        self.is_watched = is_first = True

        def compare(name: str, module: nn.Module) -> None:
            nonlocal is_first
            if self._shards:
                return
            if is_first:  # the step itself may have changed the weights
                self._compare_trainable(model)
                is_first = False
            for own, tensor in tensors_of(module) if is_whole(module) else own_tensors(module):
                self._compare(f"{name}.{own}" if name else own, tensor)

        self._in_validation.wait(model, compare)

    def differ(self) -> bool:
        """Whether the validation since `remember` was seen to use other weights. Ends the watching; waits for the
        device."""
        was_watched, self.is_watched = self.is_watched, False
        self._in_validation.stop()
        self._is_changed = self._is_changed or any_differs(self._pairs) or (was_watched and self._is_of_a_copy())
        self._pairs = []
        return self._is_changed

    def are_back(self, model: nn.Module) -> bool:
        """Whether the parameters are again those of `remember`. Waits for the device."""
        kept, self._is_changed, self._pairs = self._is_changed, False, []
        self._compare_trainable(model)
        are_back = not self._is_changed and not any_differs(self._pairs)
        self._is_changed, self._pairs = kept, []
        return are_back

    def stop(self) -> None:
        """Removes all hooks."""
        self._in_training.stop()
        self._in_validation.stop()

    def _compare_trainable(self, model: nn.Module) -> None:
        with torch._C.DisableTorchFunction():
            now = dict(tensors_of(model))
        for name in self._trainable:
            if name in now:
                self._compare(name, now[name])
            else:  # a module has taken the place of another
                self._is_changed = True

    @torch.no_grad()
    def _compare(self, name: str, tensor: Tensor) -> None:
        before = self._reference.get(name)
        if is_shard(tensor) != (name in self._shards):  # a forward before this one has left it whole, or sharded again
            return
        with torch._C.DisableTorchFunction():  # a mode that watches the step would follow each of these calls
            sample = None if before is None else elements(tensor)
        if before is not None and sample is not None:
            self._pairs.append((before, sample))

    def _is_of_a_copy(self) -> bool:
        """Whether other modules were evaluated in place of those that train.

        Either none of these was called, or one of them was not, and one of its kind was that training does not train.
        """
        trained, used = self._in_training.called, self._in_validation.called
        if not trained:
            return False
        others = {kind for name, kind in used.items() if name not in trained}
        return not trained.keys() & used.keys() or any(
            kind in others for name, kind in trained.items() if name not in used
        )
