"""How each kind of layer's input and output gradient make the gradients of its parameters, sample by sample.

B  samples in a batch    T  positions of a sample    U  features of a layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import TypeIs

from lightning_memsink.attribution.ghost_norms import Contribution, Convolution, Convolved, Dense, EmbeddingRows, Outer

Contributions = dict[str, Contribution]
GradientRule = Callable[[nn.Module, Tensor, Tensor], Contributions]
"""From a module, its input and its output's gradient, samples first, to a contribution for each parameter by name."""


def rule_of(module: nn.Module) -> GradientRule | str:
    """How to read the parameters that ``module`` itself has, or why they can't be read."""
    own = {name for name, weight in module._parameters.items() if weight is not None}
    kind = type(module)
    for known, rule in RULES.items():
        if isinstance(module, known) and kind.forward is known.forward and own <= {"weight", "bias"}:
            return rule
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
        return "it divides a row's gradient by its count in the batch" if module.scale_grad_by_freq else _embedding
    if kind.__name__.endswith("RMSNorm") and own == {"weight"}:
        return _rms_norm
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") and own <= {"weight", "bias"}:
        return _transposed_linear
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch statistics mix the samples"
    if isinstance(module, nn.RNNBase):
        return "its steps through time are hidden in one call"
    if isinstance(module, nn.MultiheadAttention):
        return "its attention uses the weights without calling its parts"
    return f"there is no rule for the parameters of {kind.__name__} itself: {', '.join(sorted(own))}"


def wants_gradient(weight: nn.Parameter | None) -> TypeIs[nn.Parameter]:
    return weight is not None and weight.requires_grad


def samples_first(values: Tensor, batch_axis: int, features: bool = True) -> Tensor:
    """With the batch in front, where there is more than one axis before the features; never in half precision."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return values.transpose(0, batch_axis) if batch_axis and values.ndim > batch_axis + features else values


def _only_wanted(module: nn.Module, **parts: Callable[[], Contribution]) -> Contributions:
    return {name: part() for name, part in parts.items() if wants_gradient(module._parameters.get(name))}


def _by_position(values: Tensor) -> Tensor:
    """``[B, T, U]`` of ``[B, ..., U]``."""
    return values[:, None] if values.ndim == 2 else values.flatten(1, -2)


def _outer(given: Tensor, gradient: Tensor) -> Outer:
    return Outer(_by_position(gradient), _by_position(given))


def _transposed_outer(given: Tensor, gradient: Tensor) -> Outer:
    return Outer(_by_position(given), _by_position(gradient))


def _linear(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    return _only_wanted(
        module,
        weight=lambda: _outer(given, gradient),
        bias=lambda: Dense(_by_position(gradient).sum(1)),
    )


def _transposed_linear(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    return _only_wanted(
        module,
        weight=lambda: _transposed_outer(given, gradient),
        bias=lambda: Dense(_by_position(gradient).sum(1)),
    )


def _embedding(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    ids, gradients = given.reshape(len(given), -1), _by_position(gradient)
    padding = cast(nn.Embedding, module).padding_idx
    if padding is not None:  # its row gets none
        gradients = gradients.masked_fill((ids == padding)[..., None], 0.0)
    return {"weight": EmbeddingRows(ids, gradients)}


def _layer_norm(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    norm = cast(nn.LayerNorm, module)
    shape = norm.normalized_shape

    def weight() -> Dense:
        return _over_positions(functional.layer_norm(given, shape, eps=norm.eps).mul_(gradient), shape)

    return _only_wanted(module, weight=weight, bias=lambda: _over_positions(gradient, shape))


def _rms_norm(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(given.dtype).eps
    shape = list(cast(Tensor, module.weight).shape)
    return {"weight": _over_positions(functional.rms_norm(given, shape, eps=eps).mul_(gradient), shape)}


def _over_positions(gradient: Tensor, shape: Sequence[int]) -> Dense:
    return Dense(gradient.reshape(len(gradient), -1, math.prod(shape)).sum(1))


def _group_norm(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    norm = cast(nn.GroupNorm, module)

    def weight() -> Dense:
        return Dense(functional.group_norm(given, norm.num_groups, eps=norm.eps).mul_(gradient).flatten(2).sum(2))

    return _only_wanted(module, weight=weight, bias=lambda: Dense(gradient.flatten(2).sum(2)))


def _convolution(module: nn.Module, given: Tensor, gradient: Tensor) -> Contributions:
    conv = cast(nn.Conv2d, module)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # What the layer itself pads with, for "same" and for every mode: the last axis first, both ends.
    if any(conv._reversed_padding_repeated_twice):
        given = functional.pad(given, conv._reversed_padding_repeated_twice, mode=mode)
    how = Convolution(conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    return _only_wanted(
        module,
        weight=lambda: Convolved(given, gradient, conv.weight.detach(), how),
        bias=lambda: Dense(gradient.flatten(2).sum(2)),
    )


RULES: dict[type[nn.Module], GradientRule] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}
FEATURES_FIRST = (nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose samples come first whatever the model's batch axis."""
OUTERS: dict[GradientRule, Callable[[Tensor, Tensor], Outer]] = {_linear: _outer, _transposed_linear: _transposed_outer}


def outer_of(module: nn.Module) -> Callable[[Tensor, Tensor], Outer] | None:
    """How the gradient of a linear layer's trainable weight is made; None for every other module."""
    rule = rule_of(module) if wants_gradient(module._parameters.get("weight")) else ""
    return None if isinstance(rule, str) else OUTERS.get(rule)
