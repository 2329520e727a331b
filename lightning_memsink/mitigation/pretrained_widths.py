"""Rebuilds Hugging Face models whose weights were cut, from a configuration with the new numbers of hidden units."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer

WIDTHS = "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim".split()
"""Settings of Hugging Face configurations that hold the number of hidden units, tried before others of equal value."""


def with_new_widths(baked: nn.Module, layers: Sequence[HiddenLayer], widths: Mapping[int, int]) -> nn.Module:
    """``baked`` with each Hugging Face model in it rebuilt from a configuration with the new widths."""
    for name, part in pretrained_parts(baked):
        own = {
            layer.units: widths[layer.units] for layer in layers if layer.name.startswith(f"{name}." if name else "")
        }
        fresh = _from_config(part, own) if own else part
        if not name:
            return fresh
        for module in list(baked.modules()):
            for name_in_module, child in module.named_children():
                if child is part:
                    setattr(module, name_in_module, fresh)
    return baked


def _from_config(part: Any, widths: Mapping[int, int]) -> nn.Module:
    """``part`` rebuilt from the first configuration that gives its weights their shapes; ``widths``: new by old."""
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
        "that were cut, so transformers could not load it. Cut all its layers of one width (modules=None), or bake the "
        "network without its Hugging Face class."
    )


def _configs(config: Any, widths: Mapping[int, int]) -> Iterator[Any]:
    """Copies of ``config`` with settings of an old width changed to the new one, the most likely first."""
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
    """A model of the class of ``part`` with ``config`` and ``state``, and the modes and settings of ``part``."""
    with torch.random.fork_rng():
        fresh: Any = type(part)(config)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    for buffer, before in zip(fresh.buffers(), part.buffers(), strict=True):
        buffer.data = before.data  # some buffers are in no state dict
    for (_, weight), (_, before) in zip(fresh.named_parameters(), part.named_parameters(), strict=True):
        weight.requires_grad_(before.requires_grad)
    for module, before in zip(fresh.modules(), part.modules(), strict=True):
        module.training = before.training
    if fresh.can_generate():
        fresh.generation_config = copy.deepcopy(part.generation_config)
    made: nn.Module = fresh
    return made


def pretrained_parts(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the outermost Hugging Face models in ``model``."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(module, kind) and not inside:
            found.append((name, module))
    return found
