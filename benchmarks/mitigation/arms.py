"""The arms of the comparison: our mitigations and those of others, each in the same run on the same text.

B  samples in a batch      U  different samples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from benchmarks.common.planted_text import World
from lightning_memsink.callbacks.goldfish import Goldfish
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.loss_truncation import LossTruncation
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger

Gate = Callable[[Tensor, Tensor], Tensor]
"""Maps ids ``[B]`` and losses ``[B]`` to a bool ``[B]``: the samples that keep their gradient. Used by rivals only."""


@dataclass(frozen=True)
class Arm:
    """How one run differs from the standard one."""

    acting: Callable[[], Sequence[Callback]] = tuple
    """Makes the mitigations; if there are any, the callbacks that they read from are added."""
    gate: Callable[[World, Mapping[str, float]], Gate] | None = None
    """Made from a world and, by kind, the number of visits of each sample to train on."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model."""
    weight_decay: float = 0.01
    world: Callable[[World, Mapping[str, float]], World] | None = None
    """Replaces the given world by another."""


def skip_planted(world: World, like: Mapping[str, float]) -> Gate:
    """An oracle: samples that are repeated to be memorized are never trained on."""
    planted = world.ids(world.repeated, "canary")
    return lambda ids, losses: ~torch.isin(ids, planted)


def capped(world: World, like: Mapping[str, float]) -> Gate:
    """An oracle: only the first visits of a sample are trained on, as many as ``like`` has for its kind."""
    left = world.times.clone()
    for kind, visits in like.items():
        left[world.ids(kind)] = round(visits)

    def gate(ids: Tensor, losses: Tensor) -> Tensor:
        kept = []
        for row in ids.tolist():
            kept.append(bool(left[row] > 0))
            left[row] -= 1
        return torch.tensor(kept)

    return gate


def once(world: World, like: Mapping[str, float]) -> World:
    """An oracle: no sample is shown twice."""
    return world.shown({kind.name: 1 for kind in world.kinds})


def thinned(world: World, like: Mapping[str, float]) -> World:
    """An oracle: samples are shown as often as ``like`` has for their kind, spread over the run."""
    return world.shown({kind: round(visits) for kind, visits in like.items()})


def floored(at: float) -> Callable[[World, Mapping[str, float]], Gate]:
    """Flooding by sample (Ishida et al. 2020): no gradient while a sample's loss is below ``at`` nats."""
    return lambda world, like: lambda ids, losses: losses >= at


def watching(acting: Sequence[Callback]) -> list[Callback]:
    """The callbacks that the mitigations ``acting`` read from; none if there is no mitigation."""
    return [LossTracker(identity="key"), MemorizationDetector()] if acting else []


def acted_share(ledger: Ledger) -> float:
    """Share of sample visits that the mitigation of a run acted on, the largest if there are several; NaN without."""
    logs = ledger.interventions.values()
    return max((log.total("acted") / max(1.0, log.total("visits")) for log in logs), default=float("nan"))


def hold(at: float | Literal["auto"], **options: Any) -> list[Callback]:
    return [SampleGradientMask(mode="hold", at=at, **options)]


def pool(pool_fraction: float = 0.75, active_fraction: float = 0.15, **options: Any) -> list[Callback]:
    return [MemSinks(pool_fraction, active_fraction, **options)]


def localized(*acting: Callback) -> list[Callback]:
    return [SinkLocalizer(norms=False, fraction=0.1), *acting]


STANDARD, HOLD, SKIP = "standard", "hold at .5", "skip the flagged"
MEMSINKS, UNTIED, SMALL = "MemSinks .75/.15, dropped", "the same, untied", "MemSinks .1/.15, dropped"
HOLD_AUTO = "hold"
"""With the set point that it measures in the run."""
HOLD_HIGH = "hold at .75"
"""The set point for fine-tuning: after some epochs every training text is half a nat below unseen ones, and .5 holds
texts that the model could still learn from. Chosen on development seeds 901 and 902, where .5 costs up to .03 nats at
the best epoch."""
SWEEP = {"hold at .1": 0.1, "hold at .25": 0.25, HOLD: 0.5, "hold at 1": 1.0, "hold at 2": 2.0}
NARROW = {"n_inner": 128}
"""MLPs of the plain model as wide as what MemSinks leaves of 512 units."""

OURS = {
    **{name: Arm(partial(hold, at)) for name, at in (SWEEP | {HOLD_HIGH: 0.75}).items()},
    HOLD_AUTO: Arm(partial(hold, "auto")),
    SKIP: Arm(lambda: [SampleGradientMask(mode="skip")]),
    "attenuate the flagged to .1": Arm(lambda: [SampleGradientMask(mode="attenuate", weight=0.1)]),
    "route the flagged": Arm(lambda: [SampleGradientMask(mode="route")]),
    MEMSINKS: Arm(pool),
    UNTIED: Arm(lambda: pool(key="anew")),
    "MemSinks .75/.3, dropped": Arm(lambda: pool(0.75, 0.3)),
    SMALL: Arm(lambda: pool(0.1)),
    "freeze localized units, 10 %": Arm(lambda: localized(SinkGradientMask())),
    "drop localized units, 10 %": Arm(lambda: localized(SinkDropout())),
}
COMBINED = {
    "MemSinks .75/.15 + hold at .5": Arm(lambda: pool() + hold(0.5)),
    "hold at .5 + weight decay .1": Arm(partial(hold, 0.5), weight_decay=0.1),
}
RIVALS = {
    "deduplicated (oracle)": Arm(world=once),
    "plain, surviving width": Arm(shape=NARROW),
    "dropout .1": Arm(shape={"dropout": 0.1}),
    "weight decay .1": Arm(weight_decay=0.1),
    "goldfish, k=4": Arm(lambda: [Goldfish(k=4)]),
    "loss truncation, 5 %": Arm(lambda: [LossTruncation()]),
    "skip from the start (oracle)": Arm(gate=skip_planted),
    "loss floor 4 (flooding)": Arm(gate=floored(4.0)),
}
GUIDED = {"first visits only (oracle)": Arm(gate=capped), "visits thinned (oracle)": Arm(world=thinned)}
"""Rivals that train on as many visits as hold at .5 did, and so run after it."""

ARMS: dict[str, Arm] = {STANDARD: Arm(), **OURS, **COMBINED, **RIVALS, **GUIDED}
EVERY_SEED = {
    "E1": (STANDARD, MEMSINKS, UNTIED, SKIP, HOLD_AUTO),
    "E2": (STANDARD, HOLD, HOLD_AUTO),
    "E3": (STANDARD, HOLD_HIGH, HOLD_AUTO),
    "E4": (STANDARD, HOLD_AUTO),
}
"""The arms that a criterion is about. All others run on one seed, since it takes long enough."""
ONCE = {
    "E1": (
        *EVERY_SEED["E1"],
        *(HOLD, "freeze localized units, 10 %", "drop localized units, 10 %"),
        *("deduplicated (oracle)", "plain, surviving width", "dropout .1", "goldfish, k=4", "loss truncation, 5 %"),
    ),
    "E2": (
        *(STANDARD, "hold at .1", HOLD, "hold at 2", HOLD_AUTO),
        *(SKIP, "attenuate the flagged to .1", "route the flagged", MEMSINKS, "deduplicated (oracle)"),
        *("skip from the start (oracle)", "loss floor 4 (flooding)", *GUIDED),
    ),
    "E3": (*EVERY_SEED["E3"], SMALL, "weight decay .1"),
    "E4": (*EVERY_SEED["E4"], HOLD, "hold at 1", "dropout .1", "weight decay .1"),
}
EXTRA = {
    "E1": ("MemSinks .75/.3, dropped", "MemSinks .75/.15 + hold at .5"),
    "E2": ("hold at .25", "hold at 1", "hold at .5 + weight decay .1", "MemSinks .75/.15 + hold at .5"),
    "E3": (HOLD, "hold at 1"),
    "E4": (),
}
"""Further arms, run on one seed with ``--arms all``: eight fits more."""
