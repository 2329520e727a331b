"""Removes designed sinks from the weights: a plain, smaller model that computes the same as the masked one."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import (
    HiddenLayer,
    base_layer,
    find_hidden_layers,
    unit_weights,
    writers_by_reader,
)
from lightning_memsink.mitigation.designed_sinks import Pool
from lightning_memsink.mitigation.pretrained_widths import pretrained_parts, with_new_widths

EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts".split()
"""Settings of Hugging Face configurations that hold a number of experts."""


def bake(
    model: nn.Module,
    pool: Pool | None = None,
    *,
    modules: Sequence[str] | None = None,
    without: Sequence[int] | Tensor | None = None,
) -> nn.Module:
    """A copy of ``model`` without its pool, of the same class, that runs and loads without this package.

    The pool's rows are removed from the up (and gate) projections and the modules in between, its columns from the down
    projections. Up to rounding, the result computes the same as the model with the pool masked. Dtypes, devices, modes,
    tied weights and generation settings are kept; forward hooks are not. ``model`` is unchanged.

    Args:
        model: a Hugging Face model (the copy gets a changed configuration), any other module, or a LightningModule.
        pool: the pool it was trained with: ``memsinks.pool``. None is the default pool.
        modules: as given to `MemSinks`.
        without: ids. Only their units are removed. The rest of the pool stays, scaled by the share of it that was on at
            a time in training, since at full strength it breaks the model. Removing one id already removes a part of
            all others' units: see `plan`.

    Raises:
        ValueError: no hidden layer is found, or one can't be cut: its writer is unknown, a norm runs over its units, it
            is wrapped (LoRA), packed, or grouped; a Hugging Face model is a mixture of experts, or its configuration
            has no setting for the new widths. ``model`` is unchanged then, too.
    """
    pool = pool or Pool()
    _refuse_experts(model)
    layers, writers = find_hidden_layers(model, modules), writers_by_reader(model)
    scales = {layer.units: _scales(pool, layer.units, without) for layer in layers}
    between = {layer.name: _between(model, layer, writers) for layer in layers}
    baked = _copy(model)
    cut = _Cut()
    for layer in layers:
        scale = scales[layer.units]
        kept = (scale != 0).nonzero()[:, 0]
        for name in writers[layer.name]:
            cut.outputs_(baked.get_submodule(name), kept, layer.units)
        for name in between[layer.name]:
            cut.channels_(baked.get_submodule(name), kept)
        cut.inputs_(baked.get_submodule(layer.name), kept, scale[kept])
    return with_new_widths(baked, layers, {units: int((scale != 0).sum()) for units, scale in scales.items()})


def _scales(pool: Pool, units: int, without: Sequence[int] | Tensor | None) -> Tensor:
    """float32 ``[U]``: a factor for each unit; 0 for a unit to remove."""
    if without is None:
        return pool.dropped(units).float()
    return pool.without(torch.as_tensor(without, dtype=torch.int64).reshape(-1).cpu(), units)


class _Cut:
    """Replaces the parameters of modules by parts of them; parameters that are shared stay shared."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], nn.Parameter] = {}
        self._originals: list[nn.Parameter] = []  # kept alive, so that no new parameter gets their id()

    def outputs_(self, module: nn.Module, kept: Tensor, units: int) -> None:
        """Keeps the outputs ``kept`` ``[k]`` of ``units``; of both halves if gate and up are one module."""
        axis = 1 if _is_hf_conv1d(module) else 0
        outputs = module.get_parameter("weight").shape[axis]
        kept = torch.cat([kept + half * units for half in range(outputs // units)])
        self._parameter_(module, "weight", axis, kept)
        self._parameter_(module, "bias", 0, kept)
        _set_size_(module, ("out_features", "out_channels", "nf"), len(kept))

    def inputs_(self, module: nn.Module, kept: Tensor, scale: Tensor) -> None:
        """Keeps the inputs ``kept`` ``[k]``, and multiplies their weights by ``scale`` ``[k]``."""
        axis = 0 if _is_hf_conv1d(module) else 1
        self._parameter_(module, "weight", axis, kept, scale)
        _set_size_(module, ("in_features", "in_channels", "nx"), len(kept))

    def channels_(self, module: nn.Module, kept: Tensor) -> None:
        """Keeps the channels ``kept`` ``[k]`` of a module that treats each unit separately."""
        for name, _ in list(module.named_parameters(recurse=False)):
            self._parameter_(module, name, 0, kept)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.ndim:
                setattr(module, name, buffer[kept.to(buffer.device)].clone())
        _set_size_(module, ("num_features", "num_parameters"), len(kept))

    def _parameter_(self, module: nn.Module, name: str, axis: int, kept: Tensor, scale: Tensor | None = None) -> None:
        original = module._parameters[name]
        if original is None:
            return
        cut = self._done.get((id(original), axis))
        if cut is None:
            weight = original.detach().index_select(axis, kept.to(original.device))
            if scale is not None and not bool((scale == 1).all()):
                shape = [-1 if n == axis else 1 for n in range(weight.ndim)]
                weight = weight * scale.to(weight).view(shape)
            cut = self._done[id(original), axis] = nn.Parameter(weight, requires_grad=original.requires_grad)
            self._originals.append(original)
        setattr(module, name, cut)


def _set_size_(module: nn.Module, names: Sequence[str], size: int) -> None:
    """Sets those of the attributes ``names`` that the module has."""
    for name in names:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, size)


# Modules that can't be cut --------------------------------------------------------------------------------------------


def _between(model: nn.Module, layer: HiddenLayer, writers: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the modules between a layer and its writers that have a parameter or buffer entry for each unit."""
    if layer.name not in writers:
        raise ValueError(
            f"{layer.name} reads units, but the structure of {type(model).__name__} does not show which module writes "
            "them, so the pool can't be cut out there. Bake models whose up and down projections are in one module."
        )
    unit_weights(layer)  # raises for a packed weight
    names = [*writers[layer.name], layer.name]
    for name in names:
        module = model.get_submodule(name)
        if base_layer(module) is not module:
            raise ValueError(f"{name} is wrapped by an adapter. Merge it into the weights (merge_and_unload) first.")
        if getattr(module, "groups", 1) != 1:
            raise ValueError(f"{name} has groups={module.groups}: its channels can't be cut one by one.")
    order = [name for name, _ in model.named_modules()]
    first, last = sorted((order.index(names[0]), order.index(layer.name)))
    inside = [name for name in order[first + 1 : last] if name not in names]
    return [name for name in inside if _has_entries_by_unit(model.get_submodule(name), name, layer)]


def _has_entries_by_unit(module: nn.Module, name: str, layer: HiddenLayer) -> bool:
    """Whether ``module`` has parameters or buffers with an entry for each unit of ``layer``.

    Raises:
        ValueError: it has, and it also mixes units with one another.
    """
    has_entries = any(layer.units in tensor.shape for tensor in _tensors_of(module))
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.PReLU)):
        return has_entries
    is_norm_over_units = layer.units in (
        getattr(module, "num_channels", None),
        *getattr(module, "normalized_shape", ()),
    )
    if has_entries or is_norm_over_units:
        raise ValueError(
            f"{name} ({type(module).__name__}) comes before {layer.name}, and its statistics or weights mix the pool "
            "with the shared units, so the pool can't be cut out there. Leave the layer out: modules=[...], in "
            "training and here."
        )
    return False


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, without those of its children."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _refuse_experts(model: nn.Module) -> None:
    for name, part in pretrained_parts(model):
        settings = part.config.to_dict()
        experts = next((key for key in EXPERTS if isinstance(settings.get(key), int) and settings[key] > 1), None)
        if experts is not None:
            raise ValueError(
                f"{name or type(part).__name__} is a mixture of experts ({experts}={settings[experts]}): its pool "
                "can't be cut out, because the router decides which units a token gets. Bake dense models."
            )


# Copies ---------------------------------------------------------------------------------------------------------------


def _copy(model: nn.Module) -> nn.Module:
    with _without_hooks(model):
        return copy.deepcopy(model)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within, no module has hooks: a hook may refer to a callback, and so to a Trainer, which must not be copied."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    before = [(module, name, vars(module)[name]) for module in model.modules() for name in names]
    for module, name, _ in before:
        vars(module)[name] = OrderedDict()
    try:
        yield
    finally:
        for module, name, hooks in before:
            vars(module)[name] = hooks


def _is_hf_conv1d(module: nn.Module) -> bool:
    return isinstance(module, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))
