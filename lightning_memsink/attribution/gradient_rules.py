"""Gradient rules: how a layer's input and output gradient make each sample's gradient of the layer's parameters.

To cover another kind of layer, decorate a function with `gradient_rule`; nothing else has to change.

B  samples in a batch    T  positions of a sample    U  features of a layer    I, O  inputs and outputs of a layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import TypeIs

from lightning_memsink.attribution.ghost_norms import Contribution, Convolution, Convolved, Dense, EmbeddingRows, Outer

Contributions = dict[str, Contribution]
"""By name of the parameter within its module."""
ReadGradient = Callable[[nn.Module, Tensor, Tensor], Contributions]
"""From a module, its input and its output's gradient, samples first, to a contribution for each trainable parameter."""
MakeOuter = Callable[[Tensor, Tensor], Outer]
"""From a linear layer's input and its output's gradient to the gradient of its weight."""


@dataclass(frozen=True)
class GradientRule:
    """How the parameters of one kind of layer are read."""

    layer: type[nn.Module] | str
    """A module class, whose ``forward`` subclasses must keep; or an `fnmatch` pattern for ``module.ClassName``."""
    parameters: frozenset[str]
    """The names of parameters that the rule reads. A module with any other is not read."""
    read: ReadGradient
    outer: MakeOuter | None
    """Of linear layers."""
    batch_first: bool
    """True if samples come first in the layer's input whatever the model's batch axis."""

    def applies_to(self, module: nn.Module) -> bool:
        kind = type(module)
        if isinstance(self.layer, str):
            known = fnmatchcase(f"{kind.__module__}.{kind.__name__}", self.layer)
        else:
            known = isinstance(module, self.layer) and kind.forward is self.layer.forward
        return known and _parameter_names(module) <= self.parameters


_RULES: list[GradientRule] = []
_REFUSED: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._BatchNorm: "batch statistics mix the samples",
    nn.RNNBase: "its steps through time are hidden in one call",
    nn.MultiheadAttention: "its attention uses the weights without calling its parts",
}


def gradient_rule(
    *layers: type[nn.Module] | str,
    parameters: Collection[str] = ("weight", "bias"),
    outer: MakeOuter | None = None,
    batch_first: bool = False,
) -> Callable[[ReadGradient], ReadGradient]:
    """Registers the decorated function as the rule of ``layers``; the other arguments are those of `GradientRule`."""

    def register(read: ReadGradient) -> ReadGradient:
        _RULES.extend(GradientRule(layer, frozenset(parameters), read, outer, batch_first) for layer in layers)
        return read

    return register


def rule_of(module: nn.Module) -> GradientRule | str:
    """The rule for the parameters that ``module`` itself has, or why they can't be read."""
    rule = next((rule for rule in _RULES if rule.applies_to(module)), None)
    if rule is not None:
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            return "it divides a row's gradient by its count in the batch"
        return rule
    for layer, reason in _REFUSED.items():
        if isinstance(module, layer):
            return reason
    names = ", ".join(sorted(_parameter_names(module)))
    return f"there is no rule for the parameters of {type(module).__name__} itself: {names}"


def outer_of(module: nn.Module) -> MakeOuter | None:
    """How the gradient of a linear layer's trainable weight is made; None for every other module."""
    if not wants_gradient(module._parameters.get("weight")):
        return None
    rule = rule_of(module)
    return None if isinstance(rule, str) else rule.outer


def wants_gradient(weight: nn.Parameter | None) -> TypeIs[nn.Parameter]:
    return weight is not None and weight.requires_grad


def samples_first(values: Tensor, batch_axis: int, features: bool = True) -> Tensor:
    """``values`` with the batch in front, where there is more than one axis before the features; at least float32."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return values.transpose(0, batch_axis) if batch_axis and values.ndim > batch_axis + features else values


def _parameter_names(module: nn.Module) -> set[str]:
    return {name for name, weight in module._parameters.items() if weight is not None}


def _trainable_only(module: nn.Module, **contributions: Callable[[], Contribution]) -> Contributions:
    return {name: make() for name, make in contributions.items() if wants_gradient(module._parameters.get(name))}


def _by_position(values: Tensor) -> Tensor:
    """``[B, T, U]`` of ``[B, ..., U]``."""
    return values[:, None] if values.ndim == 2 else values.flatten(1, -2)


def _outer(inputs: Tensor, gradient: Tensor) -> Outer:
    return Outer(_by_position(gradient), _by_position(inputs))


def _transposed_outer(inputs: Tensor, gradient: Tensor) -> Outer:
    return Outer(_by_position(inputs), _by_position(gradient))


@gradient_rule(nn.Linear, outer=_outer)
def _linear(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    return _trainable_only(
        module,
        weight=lambda: _outer(inputs, gradient),
        bias=lambda: Dense(_by_position(gradient).sum(1)),
    )


@gradient_rule("transformers.*.Conv1D", outer=_transposed_outer)
def _transposed_linear(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    """A linear layer with a ``[I, O]`` weight, as GPT-2 has it in transformers."""
    return _trainable_only(
        module,
        weight=lambda: _transposed_outer(inputs, gradient),
        bias=lambda: Dense(_by_position(gradient).sum(1)),
    )


@gradient_rule(nn.Embedding, parameters=["weight"])
def _embedding(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    ids, gradients = inputs.reshape(len(inputs), -1), _by_position(gradient)
    padding = cast(nn.Embedding, module).padding_idx
    if padding is not None:  # the padding row gets no gradient
        gradients = gradients.masked_fill((ids == padding)[..., None], 0.0)
    return {"weight": EmbeddingRows(ids, gradients)}


@gradient_rule(nn.LayerNorm)
def _layer_norm(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    norm = cast(nn.LayerNorm, module)
    shape = norm.normalized_shape

    def weight() -> Dense:
        return _over_positions(functional.layer_norm(inputs, shape, eps=norm.eps).mul_(gradient), shape)

    return _trainable_only(module, weight=weight, bias=lambda: _over_positions(gradient, shape))


@gradient_rule("*RMSNorm", parameters=["weight"])
def _rms_norm(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(inputs.dtype).eps
    shape = list(cast(Tensor, module.weight).shape)
    return {"weight": _over_positions(functional.rms_norm(inputs, shape, eps=eps).mul_(gradient), shape)}


def _over_positions(gradient: Tensor, shape: Sequence[int]) -> Dense:
    return Dense(gradient.reshape(len(gradient), -1, math.prod(shape)).sum(1))


@gradient_rule(nn.GroupNorm, batch_first=True)
def _group_norm(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    norm = cast(nn.GroupNorm, module)

    def weight() -> Dense:
        return Dense(functional.group_norm(inputs, norm.num_groups, eps=norm.eps).mul_(gradient).flatten(2).sum(2))

    return _trainable_only(module, weight=weight, bias=lambda: Dense(gradient.flatten(2).sum(2)))


@gradient_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, batch_first=True)
def _convolution(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Contributions:
    conv = cast(nn.Conv2d, module)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # What the layer itself pads with, for "same" and for every mode: the last axis first, both ends.
    if any(conv._reversed_padding_repeated_twice):
        inputs = functional.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    geometry = Convolution(conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    return _trainable_only(
        module,
        weight=lambda: Convolved(inputs, gradient, conv.weight.detach(), geometry),
        bias=lambda: Dense(gradient.flatten(2).sum(2)),
    )
