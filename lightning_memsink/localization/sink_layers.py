"""Sinks as users pass them, and the layers of a model that they name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.localization.sinks import Sinks

REMEDY = "SinkLocalizer() in Trainer(callbacks=[...]), or memsink(localize=True), locates sinks while the model trains."


def given_sinks(sinks: Sinks | str | Path) -> Sinks:
    """``sinks``, or the sinks that `Sinks.save` wrote to that path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or no unit.
    """
    loaded = sinks if isinstance(sinks, Sinks) else Sinks.load(sinks)
    if loaded.empty:
        raise ValueError(f"These sinks name no unit, so there is nothing to act on. {REMEDY}")
    return loaded


def sink_layers(model: nn.Module, sinks: Sinks) -> list[HiddenLayer]:
    """The hidden layers that have sinks, in the model's order; none where there are no sinks.

    Raises:
        ValueError: the model lacks a layer, or it has another number of units.
    """
    names = [name for name, units in sinks.units.items() if len(units)]
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        own = [layer.name for layer in find_hidden_layers(model)]
        raise ValueError(
            f"The sinks name {', '.join(missing[:4])}, but the hidden layers of {type(model).__name__} are "
            f"{', '.join(own[:4])}{', …' if len(own) > 4 else ''}. Sinks belong to the model they were located in, "
            f"under its names. {REMEDY}"
        )
    layers = find_hidden_layers(model, names) if names else []
    for layer in layers:
        if layer.units != sinks.sizes[layer.name]:
            raise ValueError(
                f"The sinks have {layer.name} with {sinks.sizes[layer.name]} units, but in {type(model).__name__} it "
                f"has {layer.units}. Sinks belong to the model they were located in. {REMEDY}"
            )
    return layers
