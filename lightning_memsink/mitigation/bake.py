"""Designed sinks taken out of the weights: a plain, smaller model that computes what the masked one did."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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

WIDTHS = "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim".split()
"""Where Hugging Face configurations keep the number of hidden units; tried first, then any other of equal value."""
EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts".split()


def bake(
    model: nn.Module,
    pool: Pool | None = None,
    *,
    modules: Sequence[str] | None = None,
    without: Sequence[int] | Tensor | None = None,
) -> nn.Module:
    """A copy of ``model`` without its pool, of the same class, that runs and loads without this package.

    The pool's rows leave the up (and gate) projections and what lies between, its columns the down projections. The
    result computes what the model did with the pool masked, to rounding. Dtypes, devices, modes, tied weights and the
    generation settings stay; forward hooks stay behind. ``model`` is left as it was.

    Args:
        model: a Hugging Face model (its configuration is changed with it), any other module, or a LightningModule.
        pool: as it was trained with: ``memsinks.pool``. None is the default pool.
        modules: as `MemSinks` was given.
        without: ids. Only their units go; the rest of the pool stays, scaled by the share of it that was on at a time
            in training, since at full strength it breaks the model. One id already takes a part of all others' units:
            see `plan`.

    Raises:
        ValueError: no hidden layer is found, or one can't be cut: its writer is unknown, a norm runs over its units, it
            is wrapped (LoRA), packed, or grouped; a Hugging Face model is a mixture of experts, or its configuration
            can't tell the new widths. ``model`` is unchanged then, too.
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
    return _rebuilt(baked, layers, {units: int((scale != 0).sum()) for units, scale in scales.items()})


def _scales(pool: Pool, units: int, without: Sequence[int] | Tensor | None) -> Tensor:
    """float32 ``[U]``: what each unit counts; 0 where it goes."""
    if without is None:
        return pool.dropped(units).float()
    return pool.without(torch.as_tensor(without, dtype=torch.int64).reshape(-1).cpu(), units)


class _Cut:
    """Cuts parameters in place of the modules that hold them; what was shared stays shared."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], nn.Parameter] = {}
        self._before: list[nn.Parameter] = []  # kept, so that their identities stay theirs

    def outputs_(self, module: nn.Module, kept: Tensor, units: int) -> None:
        """Leaves the outputs ``kept`` ``[k]`` of ``units``; of both halves where gate and up are one module."""
        axis = 1 if _is_hf_conv1d(module) else 0
        made = module.get_parameter("weight").shape[axis]
        kept = torch.cat([kept + half * units for half in range(made // units)])
        self._parameter_(module, "weight", axis, kept)
        self._parameter_(module, "bias", 0, kept)
        _say_size_(module, ("out_features", "out_channels", "nf"), len(kept))

    def inputs_(self, module: nn.Module, kept: Tensor, scale: Tensor) -> None:
        """Leaves the inputs ``kept`` ``[k]``, their weights times ``scale`` ``[k]``."""
        axis = 0 if _is_hf_conv1d(module) else 1
        self._parameter_(module, "weight", axis, kept, scale)
        _say_size_(module, ("in_features", "in_channels", "nx"), len(kept))

    def channels_(self, module: nn.Module, kept: Tensor) -> None:
        """Of a module that treats each unit by itself."""
        for name, _ in list(module.named_parameters(recurse=False)):
            self._parameter_(module, name, 0, kept)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.ndim:
                setattr(module, name, buffer[kept.to(buffer.device)].clone())
        _say_size_(module, ("num_features", "num_parameters"), len(kept))

    def _parameter_(self, module: nn.Module, name: str, axis: int, kept: Tensor, scale: Tensor | None = None) -> None:
        before = module._parameters[name]
        if before is None:
            return
        after = self._done.get((id(before), axis))
        if after is None:
            weight = before.detach().index_select(axis, kept.to(before.device))
            if scale is not None and not bool((scale == 1).all()):
                shape = [-1 if n == axis else 1 for n in range(weight.ndim)]
                weight = weight * scale.to(weight).view(shape)
            after = self._done[id(before), axis] = nn.Parameter(weight, requires_grad=before.requires_grad)
            self._before.append(before)
        setattr(module, name, after)


def _say_size_(module: nn.Module, names: Sequence[str], size: int) -> None:
    for name in names:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, size)


# What can't be cut ----------------------------------------------------------------------------------------------------


def _between(model: nn.Module, layer: HiddenLayer, writers: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the modules between a layer and its writers that hold something for each unit."""
    if layer.name not in writers:
        raise ValueError(
            f"Nobody knows which module writes the units that {layer.name} reads, so the pool can't be cut out of it. "
            "Bake models whose up and down projections stand side by side."
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
    within = [name for name in order[first + 1 : last] if name not in names]
    return [name for name in within if _is_by_unit(model.get_submodule(name), name, layer)]


def _is_by_unit(module: nn.Module, name: str, layer: HiddenLayer) -> bool:
    """Whether ``module`` holds something for each unit of ``layer``, and lets no unit see another."""
    concerned = any(layer.units in tensor.shape for tensor in _own(module))
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.PReLU)):
        return concerned
    norms_over_it = layer.units in (getattr(module, "num_channels", None), *getattr(module, "normalized_shape", ()))
    if concerned or norms_over_it:
        raise ValueError(
            f"{name} ({type(module).__name__}) lies on the way to {layer.name}, and its statistics or weights mix the "
            "pool with the shared units, so the pool can't be cut out there. Leave the layer out: modules=[...], in "
            "training and here."
        )
    return False


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _refuse_experts(model: nn.Module) -> None:
    for name, part in _pretrained_parts(model):
        settings = part.config.to_dict()
        experts = next((key for key in EXPERTS if isinstance(settings.get(key), int) and settings[key] > 1), None)
        if experts is not None:
            raise ValueError(
                f"{name or type(part).__name__} is a mixture of experts ({experts}={settings[experts]}): which expert "
                "a token goes to decides what its units see. Bake dense models."
            )


# Hugging Face and copies ----------------------------------------------------------------------------------------------


def _rebuilt(baked: nn.Module, layers: Sequence[HiddenLayer], widths: Mapping[int, int]) -> nn.Module:
    """``baked`` with each Hugging Face model in it made anew from a configuration that tells its widths."""
    for name, part in _pretrained_parts(baked):
        own = {
            layer.units: widths[layer.units] for layer in layers if layer.name.startswith(f"{name}." if name else "")
        }
        fresh = _from_config(part, own) if own else part
        if not name:
            return fresh
        for module in list(baked.modules()):
            for child, held in module.named_children():
                if held is part:
                    setattr(module, child, fresh)
    return baked


def _from_config(part: Any, widths: Mapping[int, int]) -> nn.Module:
    state = part.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    tried = list(_configs(part.config, widths))
    for config in tried:
        with torch.device("meta"):
            empty = type(part)(config)
        if {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes:
            return _loaded(part, config, state)
    raise ValueError(
        f"No setting of {type(part.config).__name__} makes a {type(part).__name__} with "
        f"{', '.join(f'{after} instead of {before}' for before, after in widths.items())} hidden units in the layers "
        "that were cut. transformers could not load it: take all its layers of one width (modules=None), or bake the "
        "network without its Hugging Face class."
    )


def _configs(config: Any, widths: Mapping[int, int]) -> Iterator[Any]:
    """Copies of ``config`` with settings of the old width changed to the new one, the likeliest first."""
    settings = config.to_dict()
    named = [name for name in WIDTHS if name in settings and settings[name] in (*widths, None)]
    others = [name for name, value in settings.items() if name not in WIDTHS and type(value) is int and value in widths]
    for names in ([named] if named else []) + [[name] for name in (*named, *others)]:
        for before in widths if len(widths) == 1 else ():
            changed = copy.deepcopy(config)
            for name in names:
                setattr(changed, name, widths[before])
            yield changed
    if len(widths) > 1:
        changed = copy.deepcopy(config)
        for name in named:
            if settings[name] is not None:
                setattr(changed, name, widths[settings[name]])
        yield changed


def _loaded(part: Any, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        fresh: Any = type(part)(config)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    for buffer, before in zip(fresh.buffers(), part.buffers(), strict=True):
        buffer.data = before.data  # those that are in no state dict
    for (_, weight), (_, before) in zip(fresh.named_parameters(), part.named_parameters(), strict=True):
        weight.requires_grad_(before.requires_grad)
    for module, before in zip(fresh.modules(), part.modules(), strict=True):
        module.training = before.training
    if fresh.can_generate():
        fresh.generation_config = copy.deepcopy(part.generation_config)
    made: nn.Module = fresh
    return made


def _pretrained_parts(model: nn.Module) -> list[tuple[str, Any]]:
    """Outermost Hugging Face models in ``model``, by name."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(module, kind) and not inside:
            found.append((name, module))
    return found


def _copy(model: nn.Module) -> nn.Module:
    with _without_hooks(model):
        return copy.deepcopy(model)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """A hook may hold a callback, a Trainer and all that hangs on them."""
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
