"""Puts back what user code has changed in modules, loaders and their parts."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchmetrics import Metric

DEPTH, LENGTH = 4, 1000
"""How far lists, dicts and plain objects are followed, and the length up to which a list's own entries are."""
OBJECTS, ELEMENTS = 5000, 1 << 20
"""Of data sets: how many objects are followed, and how many elements of their tensors are copied."""
_PARTS = ("sampler", "batch_sampler", "dataset", "data_source")
"""Attributes by which a loader reaches what may change as it is read."""
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, type(None))
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


@contextmanager
def modules_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers and attributes of all modules but metrics are as before; so is what plain attributes hold:
    tensors, arrays, lists, dicts, sets, generators and objects of the user's."""
    kept = _Kept()
    for module in model.modules():
        if not isinstance(module, Metric):
            kept.add_entries(module._buffers)
            kept.add_attributes(module, _MODULE_ATTRIBUTES)
    with kept.put_back():
        yield


@contextmanager
def loaders_kept(loaders: Iterable[Any]) -> Iterator[None]:
    """Afterwards the generators and samplers of loaders and data sets are as before, and so are persistent workers."""
    kept = _Kept()
    for loader in loaders:
        for part in _parts(loader):
            if isinstance(part, Sampler):
                kept.add_attributes(part, frozenset(_PARTS))
            for value in vars(part).values():
                if isinstance(value, _GENERATORS):
                    kept.add(value)
        if isinstance(loader, DataLoader) and loader.persistent_workers:  # they would draw other numbers next time
            kept.add_entries(vars(loader), ("persistent_workers",))
            vars(loader)["persistent_workers"] = False
    with kept.put_back():
        yield


@contextmanager
def objects_kept(roots: Iterable[Any]) -> Iterator[None]:
    """Afterwards the attributes of these objects, and of all that they hold, are what they were: numbers, generators,
    short lists, dicts and sets, small tensors and arrays. Large ones are data, and are not copied."""
    kept = _Kept()
    for root in roots:
        kept.add_deeply(root)
    with kept.put_back():
        yield


def _parts(loader: Any) -> list[Any]:
    """The loader, its samplers and data sets, and theirs."""
    found = [loader] if hasattr(loader, "__dict__") else []
    for part in found:
        inner = [getattr(part, name, None) for name in _PARTS]
        found += [each for each in inner if hasattr(each, "__dict__") and all(each is not known for known in found)]
    return found


class _Kept:
    """Copies of what objects hold."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._known: dict[int, object] = {}
        self._elements_left = ELEMENTS

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Afterwards everything that was added is as it was when it was added."""
        try:
            yield
        finally:
            with torch.inference_mode():  # in which every tensor can be written to
                for undo in reversed(self._undo):
                    undo()

    def add_attributes(self, owner: Any, left_out: frozenset[str] = frozenset(), depth: int = DEPTH) -> None:
        """All attributes but ``left_out``, and what they hold."""
        before = {name: value for name, value in vars(owner).items() if name not in left_out}
        self._undo.append(lambda: _set(vars(owner), before, left_out))
        for value in before.values():
            self.add(value, depth - 1)

    def add_entries(self, mapping: dict[str, Any], names: Iterable[str] | None = None) -> None:
        """These entries of a dict, or all, and the tensors among them."""
        before = {name: mapping[name] for name in (mapping if names is None else names)}
        self._undo.append(lambda: mapping.update(before))
        for value in before.values():
            self.add(value, DEPTH)

    def add(self, value: Any, depth: int = DEPTH) -> None:
        """What a value holds. Of tensors and arrays, those that are attributes themselves."""
        if id(value) in self._known or isinstance(value, (nn.Module, type, FunctionType, MethodType, ModuleType)):
            return
        self._known[id(value)] = value
        if isinstance(value, _GENERATORS):
            self._undo.append(_state_of(value))
        elif isinstance(value, (Tensor, np.ndarray)):
            if depth >= DEPTH - 1 and not (isinstance(value, Tensor) and value.layout != torch.strided):
                self._undo.append(_content_of(value))
        elif isinstance(value, (list, dict, set, deque)):
            before = value.copy()
            self._undo.append(lambda: _refill(value, before))
            inner = before.values() if isinstance(before, dict) else before
            for each in inner if depth and len(before) <= LENGTH else ():
                self.add(each, depth - 1)
        elif depth and hasattr(value, "__dict__") and not _is_of_a_library(value):
            self.add_attributes(value, depth=depth)

    def add_deeply(self, root: Any) -> None:
        """A data set or a collate function, the objects that they are made of among them, up to `OBJECTS`."""
        waiting = [root]
        while waiting and len(self._known) < OBJECTS:
            value = waiting.pop(0)
            if id(value) in self._known or isinstance(value, (type, FunctionType, ModuleType, *_PLAIN)):
                continue
            self._known[id(value)] = value
            if isinstance(value, MethodType):
                waiting.append(value.__self__)
            elif isinstance(value, _GENERATORS):
                self._undo.append(_state_of(value))
            elif isinstance(value, (Tensor, np.ndarray)):
                self._add_if_small(value)
            elif isinstance(value, (list, dict, set, deque)):
                if len(value) <= LENGTH:
                    before = value.copy()
                    self._undo.append(partial(_refill, value, before))
                    waiting += before.values() if isinstance(before, dict) else before
            elif isinstance(value, tuple):
                waiting += value[:LENGTH]
            elif isinstance(value, partial):
                waiting += [value.func, *value.args, *value.keywords.values()]
            elif isinstance(getattr(value, "__dict__", None), dict):
                attributes = dict(vars(value))
                self._undo.append(partial(_set, vars(value), attributes, frozenset()))
                waiting += attributes.values()

    def _add_if_small(self, value: Tensor | np.ndarray[Any, Any]) -> None:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_shared():
                return  # what is shared may be written to by another process meanwhile
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size <= self._elements_left:
            self._elements_left -= size
            self._undo.append(_content_of(value))


def _is_of_a_library(value: object) -> bool:
    """Whether an object belongs to torch or Lightning, whose parts are not the user's to count in."""
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return not packages.isdisjoint(("torch", "lightning", "pytorch_lightning", "lightning_fabric"))


def _set(attributes: dict[str, Any], before: dict[str, Any], left_out: frozenset[str]) -> None:
    for name in [name for name in attributes if name not in before and name not in left_out]:
        del attributes[name]
    attributes.update(before)


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, (list, deque)):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container.clear()
            container.extend(content)
    else:
        container.clear()
        container.update(content)


def _content_of(value: Any) -> Callable[[], object]:
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array) if value.flags.writeable else None
    before = value.detach().clone()
    return lambda: value.copy_(before)


def _state_of(generator: Any) -> Callable[[], object]:
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        return lambda: generator.setstate(python_state)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        numpy_state = bits.state
        return lambda: setattr(bits, "state", numpy_state)
    state = generator.get_state()
    return lambda: generator.set_state(state)
