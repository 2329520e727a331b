"""A pretend accelerator: tensors whose data lies in host memory, and that report another device.

Every time the host would wait for the device, every copy that it would not wait for, and every operation that mixes
devices is counted, with the lines of the package that it comes from. The first kind is what
`torch.cuda.set_sync_debug_mode` warns of: reading a number, and copies in either direction that don't say
``non_blocking``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import lightning_memsink

DEVICE = torch.device("meta")
"""What its tensors report: a device that torch knows without any backend."""
PACKAGE = str(Path(lightning_memsink.__file__).parent)
ATEN = torch.ops.aten
READS = {
    ATEN._local_scalar_dense,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN._unique2,
    ATEN.unique_dim,
    ATEN.unique_consecutive,
    ATEN.equal,
    ATEN.bincount,
    ATEN.is_nonzero,
}
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
MAY_MIX = {ATEN.copy_, ATEN._to_copy, *INDEXED}


@dataclass
class Counts:
    """What happened since the last `phase`: ``(phase, kind, lines)`` of the package, kind being "wait", "sent" (a copy
    to the host that nobody waits for) or "mismatch"."""

    phase: str = "start"
    found: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def note(self, kind: str) -> None:
        lines = _own_lines()
        if lines or kind == "mismatch":
            self.found[self.phase, kind, lines] += 1

    def of(self, phase: str, kind: str) -> dict[str, int]:
        return {lines: times for (when, what, lines), times in self.found.items() if (when, what) == (phase, kind)}


COUNTS = Counts()


class OnDevice(Tensor):
    """A tensor on the pretend device."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(args[0].host)
        if func in (Tensor.tolist, Tensor.numpy):
            COUNTS.note("wait")
            return func(args[0].host)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Also sees what is made on the device from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            is_ours = any(isinstance(each, OnDevice) for each in tree_flatten((args, kwargs))[0])
            return _run(func, args, kwargs) if is_ours or _is_device(kwargs) else func(*args, **kwargs)


@contextmanager
def pretend_device() -> Iterator[Counts]:
    """Counts while the block runs. Modules and batches are moved with `to_device`."""
    COUNTS.__init__()  # type: ignore[misc]
    enabled, dtype, tensor = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.tensor

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device) != DEVICE:
            return tensor(data, *args, device=device, **kwargs)
        COUNTS.note("wait")
        return OnDevice(tensor(data, *args, **kwargs))

    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda *a: enabled("cpu") if a == ("meta",) else enabled(*a)),
        mock.patch.object(torch, "get_autocast_dtype", lambda name: dtype("cpu" if name == "meta" else name)),
        mock.patch.object(torch, "tensor", made),
        _Mode(),
    ):
        yield COUNTS


def to_device(thing: Any) -> Any:
    """A module, in place, or a batch, as a new one whose tensors share memory with the old ones."""
    if not isinstance(thing, nn.Module):
        return tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, thing)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in thing.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(OnDevice(parameter.detach().clone()), parameter.requires_grad)
                module._parameters[name] = moved[parameter]
        module._buffers.update({name: OnDevice(b) for name, b in module._buffers.items() if b is not None})
    return thing


def to_host(tensor: Tensor) -> Tensor:
    return tensor.host if isinstance(tensor, OnDevice) else tensor


def _own_lines() -> str:
    frame: Any = sys._getframe(2)
    lines: list[str] = []
    while frame is not None and len(lines) < 3:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            lines.append(f"{file.removeprefix(PACKAGE + '/')}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


def _is_device(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    packet = func.overloadpacket
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, OnDevice)]
    here = [each for each in tensors if not isinstance(each, OnDevice)]
    if packet in READS or func is ATEN.repeat_interleave.Tensor:
        COUNTS.note("wait")
    if packet in INDEXED and isinstance(args[0], OnDevice):
        for index in args[1]:
            is_mask = isinstance(index, OnDevice) and index.dtype in (torch.bool, torch.uint8)
            if is_mask or (isinstance(index, Tensor) and not isinstance(index, OnDevice)):
                COUNTS.note("wait")
    if packet is ATEN._to_copy and kwargs.get("device") is not None:
        return _copied(func, args, kwargs)
    if packet is ATEN.copy_ and there and here:
        COUNTS.note("sent" if len(args) > 2 and args[2] else "wait")
    elif packet not in MAY_MIX and there and any(each.ndim for each in here):
        COUNTS.note("mismatch")
    is_there = bool(there) if kwargs.get("device") is None else _is_device(kwargs)
    fixed = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
    out = func(*tree_map(to_host, args), **tree_map(to_host, fixed))
    is_in_place = func._schema.is_mutable and len(func._schema.returns) == 1 and not str(packet).endswith("out")
    if is_in_place and args and isinstance(args[0], Tensor):
        return args[0]
    return tree_map(_moved, out) if is_there else out


def _copied(func: Any, args: Any, kwargs: Any) -> Any:
    was, goes = isinstance(args[0], OnDevice), _is_device(kwargs)
    if was != goes:
        COUNTS.note(("sent" if was else "given") if kwargs.get("non_blocking") else "wait")
    out = func(to_host(args[0]), **{**kwargs, "device": torch.device("cpu")})
    if out is args[0] or (was and out.data_ptr() == to_host(args[0]).data_ptr()):
        out = out.clone()
    return OnDevice(out) if goes else out


def _moved(out: Any) -> Any:
    return OnDevice(out) if isinstance(out, Tensor) and not isinstance(out, OnDevice) else out
