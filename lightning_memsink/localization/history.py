"""The history of localization: which layers and units carry memorized samples at each evaluation of a run.

N  samples known      B  samples in a batch      R  samples kept      U  units of all hidden layers together
L  hidden layers      K  blocks of modules       G  groups of samples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.feature_units import standardize
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.verdicts import Flags, Verdict, verdicts_of
from lightning_memsink.localization.concentration import Concentration, concentration_test
from lightning_memsink.localization.locate import locate
from lightning_memsink.localization.sample_attribution import RecentSamples, StepAttribution
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.samples.loss_table import LossTable

GROUPS = {"memorized": Verdict.MEMORIZED, "learned": Verdict.LEARNED, "hard": Verdict.HARD}
MAX_KEPT = 96
"""Samples of each kind whose shares are kept."""
MAX_KEPT_SHARES = 1 << 23
"""Shares kept of each kind of sample: 16 MiB in half precision."""
MIN_KEPT = 8
"""Samples of each kind that are kept whatever the number of units."""
PERMUTATIONS = 199
PERMUTATIONS_OF_MANY_UNITS = 39
"""A test at every evaluation must cost less than a step, so there are fewer permutations above `MANY_UNITS`."""
MANY_UNITS = 1 << 16
MATCHES = 3
"""Unflagged samples that each memorized one is matched with."""


@dataclass(frozen=True)
class EvaluationProfile:
    """How attribution, gradients and updates were spread over the layers between two evaluations.

    ``shares[group]`` ``[L]`` and ``norms[group]`` ``[K]``: mean over the group's visits of a sample's share of its
    attribution, and of its squared gradient norm; each sums to 1. A group without visits is absent. ``movement``
    ``[K]``: norm of an optimizer step of each block's weights, mean over recorded steps; ``by_memorized`` ``[K]``: the
    part in 0…1 that memorized samples have in the sum of all samples' gradient norms there. Checkpoints hold the
    fields under these names.
    """

    step: int
    visits: Mapping[str, int]
    shares: Mapping[str, list[float]]
    norms: Mapping[str, list[float]]
    movement: list[float]
    by_memorized: list[float]
    concentration: Concentration | None
    """Of memorized samples against matched others; None where there are too few of them."""
    agreement: Mapping[str, float]
    """Mean cosine of a group's gradients with that of held-out samples; empty where it was not taken."""


class LocalizationHistory:
    """The profile of every evaluation so far, and the attribution of the most recent samples by unit.

    Args:
        units: hidden layers and how many units each has, in the order of the model.
        blocks: names of the ``K`` groups of modules that gradient and update norms are summed over.
        fraction: of all units, to be named as sinks.
    """

    def __init__(
        self, units: Mapping[str, int] | None = None, blocks: Sequence[str] = (), fraction: float = 0.01
    ) -> None:
        self.units = dict(units or {})
        self.blocks = list(blocks)
        self.fraction = fraction
        self.rows: list[EvaluationProfile] = []
        self.sinks: Sinks | None = None
        self.memorized, self.others = RecentSamples(), RecentSamples()
        self._sums = RunningSums()

    def set_model(self, units: Mapping[str, int], blocks: Sequence[str]) -> None:
        """Sets hidden layers and blocks once the model is built.

        Raises:
            ValueError: a checkpoint that was restored before has other hidden layers.
        """
        if self.units:
            _require_same(self.units, units)
        self.units, self.blocks = dict(units), list(blocks)

    def record(self, step: StepAttribution, verdicts: Tensor, update_norms: Tensor | None = None) -> None:
        """Adds one training step: its attribution, the verdicts ``[B]`` (codes) and the update norms ``[K]``.

        A sample is left out if it has no gradient, as under a mitigation that removes samples, or if its attribution is
        not finite, as when a gradient scaler provokes an overflow: neither says where the sample is memorized.
        """
        values = step.shares if step.norms is None else torch.cat([step.shares, step.norms], 1)
        usable = values.any(1) & values.isfinite().all(1)
        step, verdicts = step.select(usable), verdicts[usable]
        layers = torch.stack([part.sum(1) for part in step.shares.abs().split(list(self.units.values()), 1)], 1)
        self._sums.add(step, verdicts, layers, update_norms)
        most = max(MIN_KEPT, min(MAX_KEPT, MAX_KEPT_SHARES // max(1, step.shares.shape[1])))
        is_memorized = verdicts == Verdict.MEMORIZED
        self.memorized.add(step.ids[is_memorized], step.shares[is_memorized], most)
        is_other = (verdicts == Verdict.LEARNED) | (verdicts == Verdict.HARD)
        self.others.add(step.ids[is_other], step.shares[is_other], most)

    def close_evaluation(self, table: LossTable, flags: Flags) -> None:
        """After an evaluation: a new row and new sinks. A second call for the same evaluation does nothing."""
        last = flags.evaluations[-1].step if flags.evaluations else -1
        if last <= (self.rows[-1].step if self.rows else -1) or not self._sums.steps:
            return
        target, control = self._matched_shares(table, flags)
        concentration = _concentration(target.abs(), control.abs())
        self.rows.append(self._sums.profile(last, concentration))
        self._sums = RunningSums()
        if len(target) and len(control):
            self.sinks = locate(self._by_layer(target), self._by_layer(control), self.fraction)

    def _matched_shares(self, table: LossTable, flags: Flags) -> tuple[Tensor, Tensor]:
        """Shares ``[R, U]`` of the samples that are memorized now, and of the others that are nearest to them."""
        verdicts = [verdicts_of(recent.ids, table, flags) for recent in (self.memorized, self.others)]
        is_target, is_control = verdicts[0] == Verdict.MEMORIZED, verdicts[1] != Verdict.MEMORIZED
        target, control = self.memorized.shares[is_target].float(), self.others.shares[is_control].float()
        if not len(target) or not len(control):
            return target, control
        points, reference = (
            torch.cat([table.features[rows].float(), table.early_loss[rows, None].float()], 1)
            for rows in (table.index.find(self.memorized.ids[is_target]), table.index.find(self.others.ids[is_control]))
        )
        matched = nearest(*standardize(points, reference), MATCHES)[0]
        return target, control[matched.unique()]

    def _by_layer(self, shares: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.units, shares.split(list(self.units.values()), 1), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "units": self.units,
            "blocks": self.blocks,
            "rows": [asdict(row) for row in self.rows],
            "memorized": self.memorized.state_dict(),
            "others": self.others.state_dict(),
            "window": self._sums.state_dict(),
            "sinks": None if self.sinks is None else _sinks_state(self.sinks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state.

        Raises:
            ValueError: the hidden layers of the checkpoint differ from those of the model, where these are known.
        """
        if self.units:
            _require_same(state["units"], self.units)
        self.units, self.blocks = dict(state["units"]), list(state["blocks"])
        self.rows = [
            EvaluationProfile(
                **{**row, "concentration": row["concentration"] and Concentration(**row["concentration"])}
            )
            for row in state["rows"]
        ]
        for name in ("memorized", "others"):
            getattr(self, name).load_state_dict(state[name])
        self._sums.load_state_dict(state["window"])
        self.sinks = None if state["sinks"] is None else Sinks(**state["sinks"])


class RunningSums:
    """Sums over the training steps since the last evaluation, by name; per group of samples where named after one."""

    def __init__(self) -> None:
        self.steps = self.updates = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, step: StepAttribution, verdicts: Tensor, layers: Tensor, update_norms: Tensor | None) -> None:
        """Adds one step, with its shares summed over the units of each layer: ``layers`` ``[B, L]``."""
        self.steps += 1
        norms, alignment = step.norms, step.alignment
        for group, verdict in GROUPS.items():
            rows = verdicts == verdict
            if rows.any():
                self._add(f"visits/{group}", rows.sum())
                self._add(f"shares/{group}", layers[rows].sum(0))
                if alignment is not None:
                    self._add(f"agreement/{group}", torch.stack([alignment[rows].sum(), rows.sum()]))
                if norms is None:
                    self._add(f"without_norms/{group}", rows.sum())
                else:
                    squared = norms[rows].square()
                    self._add(f"norms/{group}", (squared / squared.sum(1, keepdim=True).clamp(min=1e-30)).sum(0))
        if norms is not None:
            self._add("gradient/all", norms.nansum(0))
            self._add("gradient/memorized", norms[verdicts == Verdict.MEMORIZED].nansum(0))
        if update_norms is not None:
            self.updates += 1
            self._add("movement", update_norms)

    def profile(self, step: int, concentration: Concentration | None) -> EvaluationProfile:
        """The means of all sums, for the evaluation at ``step``."""
        visits = {group: int(self.sums[f"visits/{group}"]) for group in GROUPS if f"visits/{group}" in self.sums}
        without = {"norms": {group: int(self.sums.get(f"without_norms/{group}", 0)) for group in visits}}
        means = {
            kind: {
                group: (self.sums[f"{kind}/{group}"] / (count - without.get(kind, {}).get(group, 0))).tolist()
                for group, count in visits.items()
                if f"{kind}/{group}" in self.sums
            }
            for kind in ("shares", "norms")
        }
        none = torch.zeros(0)
        update_norms = self.sums.get("movement", none) / max(1, self.updates)
        part = self.sums.get("gradient/memorized", none) / self.sums.get("gradient/all", none).clamp(min=1e-30)
        agreement = {
            group: float(self.sums[f"agreement/{group}"][0] / self.sums[f"agreement/{group}"][1])
            for group in visits
            if f"agreement/{group}" in self.sums
        }
        return EvaluationProfile(
            step,
            visits,
            means["shares"],
            means["norms"],
            update_norms.tolist(),
            part.tolist(),
            concentration,
            agreement,
        )

    def _add(self, name: str, values: Tensor) -> None:
        values = values.detach().double().cpu()
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.steps, "moves": self.updates, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.updates, self.sums = state["looks"], state["moves"], dict(state["sums"])


def _concentration(target: Tensor, control: Tensor) -> Concentration | None:
    if not len(target) or not len(control):
        return None
    permutations = PERMUTATIONS if target.shape[1] <= MANY_UNITS else PERMUTATIONS_OF_MANY_UNITS
    result = concentration_test(target, control, permutations)
    return result if isinstance(result, Concentration) else None


def _sinks_state(sinks: Sinks) -> dict[str, Any]:
    columns = {"units": dict(sinks.units), "scores": dict(sinks.scores), "sizes": dict(sinks.sizes)}
    return {**columns, "method": sinks.method, "stability": sinks.stability}


def _require_same(restored: Mapping[str, int], found: Mapping[str, int]) -> None:
    if restored != found:
        raise ValueError(
            f"The checkpoint holds attribution of hidden layers {_some(restored)}, but the model has {_some(found)}. "
            "Resume with the same model and the same `modules`, or without ckpt_path."
        )


def _some(units: Mapping[str, int]) -> str:
    names = [f"{name} ({size})" for name, size in units.items()]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
