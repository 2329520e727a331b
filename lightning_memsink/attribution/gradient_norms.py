"""Exact per-sample gradient norms of a model's layers, read in the user's own backward.

B  samples in a batch    K  blocks of modules    T  positions of a sample    U  outputs of a module
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink._host_copy import on_host
from lightning_memsink.attribution.broadcast_gradients import BroadcastGradients, has_selected_rows
from lightning_memsink.attribution.ghost_norms import Contribution, Outer, Tied, samples_of, squared_norm, tie
from lightning_memsink.attribution.gradient_rules import GradientRule, rule_of, samples_first, wants_gradient
from lightning_memsink.attribution.module_hooks import ModuleCalls, first_tensor
from lightning_memsink.attribution.token_owners import TokenOwners
from lightning_memsink.attribution.unit_effects import divide_by_weights
from lightning_memsink.attribution.update_norms import block_of


def total_squared_norm(norms: Mapping[str, Tensor]) -> Tensor:
    """``[B]`` squared norm over all layers."""
    return torch.stack(list(norms.values())).sum(0)


def block_norms(squared_norms: Mapping[str, Tensor], blocks: Sequence[str], batch_size: int) -> Tensor:
    """Float32 ``[B, K]`` on the CPU: gradient norms by block, from squared norms ``[B]`` by module."""
    norms = torch.zeros(batch_size, len(blocks))
    for name, squared in zip(squared_norms, on_host(list(squared_norms.values())), strict=True):
        norms[:, blocks.index(block_of(f"{name}.weight"))] += squared
    return norms.sqrt()


class GradientNorms:
    """Squared norms of each sample's gradient, by module, for all of ``model`` that can be read exactly.

    Call `open` before a forward and `finish` after its backward; in between nothing else may run the model. Layers with
    a parameter that requires a gradient now are hooked: build it before the first compiled call.

    Args:
        model: anything made of modules.
        batch_axis: where the samples are in inputs of three axes and more: 1 if sequences come first.

    Where rows hold several documents, set ``owners`` after `open` and before the backward: norms are those of documents
    then, ``[D]``, exact where no layer mixes tokens otherwise than attention does.

    A parameter of several modules counts for the first of them. Below a BatchNorm in training, a sample's norm is that
    of the part of the gradient that runs through the sample: a gradient of its own does not exist there.
    """

    def __init__(self, model: nn.Module, batch_axis: int = 0) -> None:
        self.batch_axis = batch_axis
        self.owners: TokenOwners | None = None
        self._rules: dict[str, GradientRule] = {}
        self._modules: dict[str, nn.Module] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._keys: dict[str, dict[str, int]] = {}  # of a module by local name: FSDP2 puts others in their place
        self._users: dict[int, list[str]] = defaultdict(list)
        self._never_read: dict[str, str] = {}
        self._missed: dict[str, str] = {}  # in the last step
        for name, module, rule in _trainable(model):
            own = {local: weight for local, weight in module._parameters.items() if wants_gradient(weight)}
            self._keys[name] = {local: id(weight) for local, weight in own.items()}
            for weight in own.values():
                self._parameters[id(weight)] = weight
                self._users[id(weight)].append(name)
            if isinstance(rule, str):
                self._never_read[name] = rule
            else:
                self._modules[name], self._rules[name] = module, rule
        self._broadcasts = BroadcastGradients(batch_axis)
        self._calls = ModuleCalls(self._modules, "output", self._read_call)
        self._handles = [
            module.register_forward_pre_hook(self._before_forward(name, module), with_kwargs=True)
            for name, module in self._modules.items()
        ] + [
            module.register_forward_hook(self._after_lookup(name))
            for name, module in self._modules.items()
            if isinstance(module, nn.Embedding)
        ]
        self._reset()

    @property
    def uncovered(self) -> dict[str, str]:
        """Modules whose parameters are not, or in the last step were not, read in full; and why."""
        return {**self._never_read, **self._missed}

    @property
    def covered(self) -> float:
        """The fraction of trainable parameters that are read exactly."""
        reasons = self.uncovered
        missing = sum(
            self._parameters[key].numel() for key, users in self._users.items() if reasons.keys() & set(users)
        )
        return 1 - missing / max(1, sum(weight.numel() for weight in self._parameters.values()))

    def open(self) -> None:
        """Records from the next forward on."""
        self._reset()
        self.owners = None
        self._missed.clear()
        self._calls.open()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, a backward is not recorded."""
        return self._calls.paused()

    def finish(self, batch_size: int, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Squared norms ``[B]`` by module, of parameters that are read in full. Stops recording.

        Args:
            batch_size: B.
            weights: ``[B]``, each sample's weight in what was differentiated: the derivative of that by the sample's
                own mean loss. Without, the norms are of the gradient as it was. A sample of weight 0 gets zeros.
        """
        uses = self._calls.uses()
        for name in self._calls.close():
            self._missed[name] = "its input was freed before its gradient came"
        for key in list(self._contributions):
            self._compute_norm(key)
        for key, norm in self._norms.items():
            if len(norm) != batch_size:
                reason = f"its input has {len(norm)} rows along the batch axis, not {batch_size}"
                self._missed.update((name, self._missed.get(name, reason)) for name in self._users[key])
        self._report_without_gradient(uses)
        reasons = self.uncovered
        norms: dict[str, Tensor] = {}
        for key, users in self._users.items():
            if key in self._norms and not reasons.keys() & set(users):
                first = users[0]
                norms[first] = norms[first] + self._norms[key] if first in norms else self._norms[key]
        self._reset()
        if weights is None:
            return norms
        return {name: divide_by_weights(norm, weights, power=2) for name, norm in norms.items()}

    def remove(self) -> None:
        """Removes the hooks; a second call does nothing."""
        self._calls.remove()
        self._reset()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _reset(self) -> None:
        self._contributions: dict[int, list[Contribution]] = defaultdict(list)
        self._norms: dict[int, Tensor] = {}
        self._expected_calls: dict[int, int] = {}
        self._kept_inputs: dict[str, list[Tensor]] = defaultdict(list)
        self._ids: dict[str, list[Tensor]] = defaultdict(list)
        self._broadcasts.reset()

    def _report_without_gradient(self, uses: Mapping[str, int]) -> None:
        """Adds modules to the missed ones: called without a gradient, or with a gradient though not called."""
        for key, users in self._users.items():
            if key in self._norms or self.uncovered.keys() & set(users):
                continue
            called = any(uses[name] for name in users)
            if called or self._parameters[key].grad is not None:
                reason = (
                    "its gradient never came" if called else "it was not called, though its weights have a gradient"
                )
                self._missed.update((name, reason) for name in users)

    def _before_forward(self, name: str, module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        by_rows, is_lookup = isinstance(module, (nn.Linear, nn.LayerNorm)), isinstance(module, nn.Embedding)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not self._calls.is_open:
                return
            inputs = first_tensor(args, kwargs)
            if inputs is None:
                return
            self._broadcasts.search(inputs)
            if by_rows and inputs.ndim == 2 and has_selected_rows(inputs):
                self._missed[name] = "its input is rows picked out of a flattened batch"
            if is_lookup:
                self._ids[name].append(inputs)
            # Autograd may keep only a view or a copy in another precision. A checkpoint keeps nothing and runs again.
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
                self._kept_inputs[name].append(inputs)

        return hook

    def _after_lookup(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._calls.is_open and self._ids[name] and output.grad_fn is not None:
                self._broadcasts.expect(name, self._ids[name][-1], output)

        return hook

    def _read_call(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        # A backward within autocast would take these products in half precision.
        if torch.is_autocast_enabled(gradient.device.type):
            with torch.autocast(gradient.device.type, enabled=False):
                self._read(name, inputs, gradient)
        else:
            self._read(name, inputs, gradient)

    def _read(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        if name in self._missed:
            return
        if not self._expected_calls:
            uses = self._calls.uses()
            self._expected_calls = {key: sum(uses.get(user, 0) for user in users) for key, users in self._users.items()}
        module, rule = self._modules[name], self._rules[name]
        is_lookup = isinstance(module, nn.Embedding)
        if is_lookup:
            per_sample = self._broadcasts.resolve(name, inputs, gradient)
            if per_sample is None:
                self._missed[name] = "its output is broadcast over the samples in a way that could not be followed"
                return
            inputs, gradient = per_sample
        axis = 0 if rule.batch_first else self.batch_axis
        inputs, gradient = samples_first(inputs, axis, features=not is_lookup), samples_first(gradient, axis)
        if self.owners is not None:
            unpacked = self._unpacked(self.owners, rule, inputs, gradient, is_lookup)
            if unpacked is None:
                self._missed[name] = f"its input {list(inputs.shape)} is not of the tokens of documents alone"
                return
            inputs, gradient = unpacked
        keys = self._keys[name]
        for local, contribution in rule.read(module, inputs, gradient).items():
            self._add(name, keys[local], contribution)
        if all(self._expected_calls[key] <= 1 for key in keys.values()):
            self._kept_inputs.pop(name, None)

    def _unpacked(
        self, owners: TokenOwners, rule: GradientRule, inputs: Tensor, gradient: Tensor, is_lookup: bool
    ) -> tuple[Tensor, Tensor] | None:
        """A layer's input and its output's gradient, a document a row; None if it doesn't take token by token."""
        is_flat_of_columns = self.batch_axis == 1 and gradient.ndim == 2 and 1 not in owners.shape
        if rule.batch_first or is_flat_of_columns:  # convolutions and group norms see a token's neighbours
            return None
        own = owners.unpacked(inputs, 0 if is_lookup else 1), owners.unpacked(gradient)
        return None if own[0] is None or own[1] is None else (own[0], own[1])

    def _add(self, name: str, key: int, contribution: Contribution) -> None:
        if key in self._norms:
            self._missed[name] = "it was used again after its gradient was taken (in a reentrant checkpoint, say)"
            return
        others = self._contributions[key]
        others.append(self._tied(key, contribution) if isinstance(contribution, Outer) and not others else contribution)
        if len(others) >= self._expected_calls[key]:
            self._compute_norm(key)

    def _tied(self, key: int, outer: Outer) -> Outer | Tied:
        """What to keep of an output layer's gradient until that of the embedding it shares comes."""
        ids = [each for user in self._users[key] for each in self._ids.get(user, [])]
        if self._expected_calls[key] != 2 or len(ids) != 1 or self.batch_axis:
            return outer
        own = ids[0] if self.owners is None else self.owners.unpacked(ids[0], 0)
        if own is None or own.shape[:1] != outer.left.shape[:1]:
            return outer
        return tie(outer, own.reshape(len(own), -1))

    def _compute_norm(self, key: int) -> None:
        contributions = self._contributions.pop(key)
        if len({samples_of(each) for each in contributions}) > 1:
            self._missed.update((name, "its calls differ in their number of rows") for name in self._users[key])
        else:
            self._norms[key] = squared_norm(contributions, self._parameters[key].shape)


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
