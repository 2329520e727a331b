"""Exact per-sample gradient norms of a model's layers, read in the user's own backward.

B  samples in a batch    T  positions of a sample    U  outputs of a module
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.broadcast_gradients import Broadcasts, picked_rows
from lightning_memsink.attribution.ghost_norms import Contribution, Outer, Tied, samples_of, squared_norm, tie
from lightning_memsink.attribution.gradient_rules import (
    FEATURES_FIRST,
    GradientRule,
    rule_of,
    samples_first,
    wants_gradient,
)
from lightning_memsink.attribution.module_hooks import ModuleCalls
from lightning_memsink.attribution.unit_effects import divide_by_weights


def total(norms: Mapping[str, Tensor]) -> Tensor:
    """``[B]`` squared norm over all layers."""
    return torch.stack(list(norms.values())).sum(0)


class GradientNorms:
    """Squared norms of each sample's gradient, by module, for all of ``model`` that can be read exactly.

    Call `open` before a forward and `finish` after its backward; in between nothing else may run the model. Layers with
    a parameter that requires a gradient now are hooked: build it before the first compiled call.

    Args:
        model: anything made of modules.
        batch_axis: where the samples are in inputs of three axes and more: 1 if sequences come first.

    A parameter of several modules counts for the first of them. Below a BatchNorm in training, a sample's norm is that
    of the part of the gradient that runs through the sample: a gradient of its own does not exist there.
    """

    def __init__(self, model: nn.Module, batch_axis: int = 0) -> None:
        self.batch_axis = batch_axis
        self._rules: dict[str, GradientRule] = {}
        self._modules: dict[str, nn.Module] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._keys: dict[str, dict[str, int]] = {}  # of a module by local name: FSDP2 puts others in their place
        self._users: dict[int, list[str]] = defaultdict(list)
        self._never: dict[str, str] = {}
        self._now: dict[str, str] = {}
        for name, module, rule in _trainable(model):
            own = {local: weight for local, weight in module._parameters.items() if wants_gradient(weight)}
            self._keys[name] = {local: id(weight) for local, weight in own.items()}
            for weight in own.values():
                self._parameters[id(weight)] = weight
                self._users[id(weight)].append(name)
            if isinstance(rule, str):
                self._never[name] = rule
            else:
                self._modules[name], self._rules[name] = module, rule
        self._broadcasts = Broadcasts(batch_axis)
        self._calls = ModuleCalls(self._modules, "output", self._on_pair)
        self._handles = [
            module.register_forward_pre_hook(self._before(name, module), with_kwargs=True)
            for name, module in self._modules.items()
        ] + [
            module.register_forward_hook(self._after_lookup(name))
            for name, module in self._modules.items()
            if isinstance(module, nn.Embedding)
        ]
        self._forget()

    @property
    def uncovered(self) -> dict[str, str]:
        """Modules whose parameters are not, or in the last step were not, read in full; and why."""
        return {**self._never, **self._now}

    @property
    def covered(self) -> float:
        """The fraction of trainable parameters that are read exactly."""
        reasons = self.uncovered
        missing = sum(
            self._parameters[key].numel() for key, users in self._users.items() if reasons.keys() & set(users)
        )
        return 1 - missing / max(1, sum(weight.numel() for weight in self._parameters.values()))

    def open(self) -> None:
        """From the next forward on."""
        self._forget()
        self._now.clear()
        self._calls.open()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, a backward passes unseen."""
        return self._calls.paused()

    def finish(self, batch_size: int, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Squared norms ``[B]`` by module, of parameters that are read in full. Closes.

        Args:
            batch_size: B.
            weights: ``[B]``, each sample's weight in what was differentiated: the derivative of that by the sample's
                own mean loss. Without, the norms are of the gradient as it was. A sample of weight 0 gets zeros.
        """
        uses = self._calls.uses()
        for name in self._calls.close():
            self._now[name] = "its input was gone before its gradient came"
        for key in list(self._parts):
            self._settle(key)
        for key, norm in self._norms.items():
            if len(norm) != batch_size:
                found = f"its input has {len(norm)} rows along the batch axis, not {batch_size}"
                self._now.update((name, self._now.get(name, found)) for name in self._users[key])
        self._miss_unseen(uses)
        reasons = self.uncovered
        norms: dict[str, Tensor] = {}
        for key, users in self._users.items():
            if key in self._norms and not reasons.keys() & set(users):
                home = users[0]
                norms[home] = norms[home] + self._norms[key] if home in norms else self._norms[key]
        self._forget()
        if weights is None:
            return norms
        return {name: divide_by_weights(norm, weights, power=2) for name, norm in norms.items()}

    def remove(self) -> None:
        """Takes the hooks away; a second time does nothing."""
        self._calls.remove()
        self._forget()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forget(self) -> None:
        self._parts: dict[int, list[Contribution]] = defaultdict(list)
        self._norms: dict[int, Tensor] = {}
        self._expected: dict[int, int] = {}
        self._held: dict[str, list[Tensor]] = defaultdict(list)
        self._ids: dict[str, list[Tensor]] = defaultdict(list)
        self._broadcasts.forget()

    def _miss_unseen(self, uses: Mapping[str, int]) -> None:
        """A module that was not called has no gradient, unless its weights were used without it."""
        for key, users in self._users.items():
            if key in self._norms or self.uncovered.keys() & set(users):
                continue
            called = any(uses[name] for name in users)
            if called or self._parameters[key].grad is not None:
                reason = (
                    "its gradient never came" if called else "it was not called, though its weights have a gradient"
                )
                self._now.update((name, reason) for name in users)

    def _before(self, name: str, module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        by_rows, looks_up = isinstance(module, (nn.Linear, nn.LayerNorm)), isinstance(module, nn.Embedding)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not self._calls.is_open:
                return
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if given is None:
                return
            self._broadcasts.seek(given)
            if by_rows and given.ndim == 2 and picked_rows(given):
                self._now[name] = "its input is rows picked out of a flattened batch"
            if looks_up:
                self._ids[name].append(given)
            # Autograd may keep only a view or a copy in another precision. A checkpoint keeps nothing and runs again.
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
                self._held[name].append(given)

        return enter

    def _after_lookup(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._calls.is_open and self._ids[name] and output.grad_fn is not None:
                self._broadcasts.expect(name, self._ids[name][-1], output)

        return leave

    def _on_pair(self, name: str, given: Tensor, gradient: Tensor) -> None:
        # A backward within autocast would take these products in half precision.
        if torch.is_autocast_enabled(gradient.device.type):
            with torch.autocast(gradient.device.type, enabled=False):
                self._read(name, given, gradient)
        else:
            self._read(name, given, gradient)

    def _read(self, name: str, given: Tensor, gradient: Tensor) -> None:
        if name in self._now:
            return
        if not self._expected:
            uses = self._calls.uses()
            self._expected = {key: sum(uses.get(user, 0) for user in users) for key, users in self._users.items()}
        module = self._modules[name]
        looks_up = isinstance(module, nn.Embedding)
        if looks_up:
            full = self._broadcasts.resolve(name, given, gradient)
            if full is None:
                self._now[name] = "its output is broadcast over the samples in a way that could not be followed"
                return
            given, gradient = full
        axis = 0 if isinstance(module, FEATURES_FIRST) else self.batch_axis
        given, gradient = samples_first(given, axis, features=not looks_up), samples_first(gradient, axis)
        keys = self._keys[name]
        for local, part in self._rules[name](module, given, gradient).items():
            self._add(name, keys[local], part)
        if all(self._expected[key] <= 1 for key in keys.values()):
            self._held.pop(name, None)

    def _add(self, name: str, key: int, part: Contribution) -> None:
        if key in self._norms:
            self._now[name] = "it was used again after its gradient was taken (in a reentrant checkpoint, say)"
            return
        parts = self._parts[key]
        parts.append(self._tied(key, part) if isinstance(part, Outer) and not parts else part)
        if len(parts) >= self._expected[key]:
            self._settle(key)

    def _tied(self, key: int, outer: Outer) -> Outer | Tied:
        """What to keep of an output layer's gradient until that of the embedding it shares comes."""
        ids = [each for user in self._users[key] for each in self._ids.get(user, [])]
        if self._expected[key] != 2 or len(ids) != 1 or ids[0].shape[:1] != outer.left.shape[:1] or self.batch_axis:
            return outer
        return tie(outer, ids[0].reshape(len(ids[0]), -1))

    def _settle(self, key: int) -> None:
        parts = self._parts.pop(key)
        if len({samples_of(part) for part in parts}) > 1:
            self._now.update((name, "its calls differ in their number of rows") for name in self._users[key])
        else:
            self._norms[key] = squared_norm(parts, self._parameters[key].shape)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Module, GradientRule | str]]:
    """Modules that have a trainable parameter themselves, by name, each with its rule or the reason it has none."""
    opaque = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    within = {part for module in opaque for part in module.modules()}
    rules = {
        name: (module, rule_of(opaque[0]) if module in within else rule_of(module))
        for name, module in model.named_modules()
        if any(wants_gradient(weight) for weight in module._parameters.values())
    }
    read = {
        id(weight)
        for module, rule in rules.values()
        if not isinstance(rule, str)
        for weight in module._parameters.values()
    }
    for name, (module, rule) in rules.items():
        # A container may name a parameter that a layer within it uses, as BERT's head does.
        if not isinstance(rule, str) or {id(weight) for weight in module._parameters.values()} - read:
            yield name, module, rule
