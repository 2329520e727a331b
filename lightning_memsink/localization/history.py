"""Which layers and units carry memorized samples, and how that moves while training goes on.

N  samples known      B  samples in a batch      R  samples remembered      U  units of all hidden layers together
L  hidden layers      K  blocks of modules       G  groups of samples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import standardize
from lightning_memsink.detection.verdicts import Flags, Verdict, verdicts_of
from lightning_memsink.localization.concentration import Concentration, concentration_test
from lightning_memsink.localization.locate import locate
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.samples.loss_table import LossTable

GROUPS = {"memorized": Verdict.MEMORIZED, "learned": Verdict.LEARNED, "hard": Verdict.HARD}
MOST_REMEMBERED = 96
BUDGET = 1 << 23
"""Shares remembered of each kind of sample, at most: 16 MiB."""
MOST_PERMUTATIONS, FEW_PERMUTATIONS, MANY_UNITS = 199, 39, 1 << 16
"""A test at every evaluation must cost less than a step; fewer permutations where there are many units."""
FELLOWS = 3
"""Unflagged samples that a memorized one is matched with."""


@dataclass(frozen=True)
class EvaluationProfile:
    """How attribution, gradient and movement were spread over the layers between two evaluations.

    ``shares[group]`` ``[L]`` and ``norms[group]`` ``[K]``: mean over the group's visits of a sample's share of its
    attribution, and of its squared gradient norm; each sums to 1. A group without visits is absent. ``movement``
    ``[K]``: norm of an optimizer step of each block's weights, mean over looks; ``by_memorized`` ``[K]``: the part in
    0…1 that memorized samples have in the sum of all samples' gradient norms there.
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
    """The spread at every evaluation so far, and the newest samples' attribution by unit.

    Args:
        units: hidden layers and how many units each has, in the order of the model.
        blocks: names of the ``K`` groups of modules that gradient norms and movement are told of.
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
        self.memorized, self.others = _Newest(), _Newest()
        self._window = _Window()

    def of_model(self, units: Mapping[str, int], blocks: Sequence[str]) -> None:
        """Once the model is built. Raises ValueError if a checkpoint's, restored before, are others."""
        if self.units:
            _require_same(self.units, units)
        self.units, self.blocks = dict(units), list(blocks)

    def record(
        self,
        ids: Tensor,
        verdicts: Tensor,
        shares: Tensor,
        norms: Tensor | None = None,
        movement: Tensor | None = None,
        agreement: Tensor | None = None,
    ) -> None:
        """One look: ``ids`` and ``verdicts`` ``[B]`` (codes), signed ``shares`` ``[B, U]``, ``norms`` ``[B, K]`` (not
        squared yet), ``movement`` ``[K]``, ``agreement`` ``[B]``. A sample without any gradient, as a mitigation that
        leaves samples out makes it, or with one that is NaN or overflowed, as a gradient scaler provokes it now and
        then, tells nothing of where it sits, and is passed over.
        """
        found = shares if norms is None else torch.cat([shares, norms], 1)
        told = found.any(1) & found.isfinite().all(1)
        ids, verdicts, shares = ids[told], verdicts[told], shares[told]
        norms = None if norms is None else norms[told]
        agreement = None if agreement is None else agreement[told]
        layers = torch.stack([part.sum(1) for part in shares.abs().split(list(self.units.values()), 1)], 1)
        self._window.add(verdicts, layers, norms, movement, agreement)
        most = max(8, min(MOST_REMEMBERED, BUDGET // max(1, shares.shape[1])))
        stands = verdicts == Verdict.MEMORIZED
        self.memorized.put(ids[stands], shares[stands], most)
        judged = (verdicts == Verdict.LEARNED) | (verdicts == Verdict.HARD)
        self.others.put(ids[judged], shares[judged], most)

    def close_evaluation(self, table: LossTable, flags: Flags) -> None:
        """After an evaluation: a new row and new sinks. A second call for the same evaluation does nothing."""
        last = flags.evaluations[-1].step if flags.evaluations else -1
        if last <= (self.rows[-1].step if self.rows else -1) or not self._window.looks:
            return
        target, control = self._contrast(table, flags)
        concentration = _clustering(target.abs(), control.abs())
        self.rows.append(self._window.spread(last, concentration))
        self._window = _Window()
        if len(target) and len(control):
            self.sinks = locate(self._by_layer(target), self._by_layer(control), self.fraction)

    def _contrast(self, table: LossTable, flags: Flags) -> tuple[Tensor, Tensor]:
        """Shares ``[R, U]`` of samples that stand as memorized now, and of the others that are most like them."""
        verdicts = [verdicts_of(newest.ids, table, flags) for newest in (self.memorized, self.others)]
        stands, stays = verdicts[0] == Verdict.MEMORIZED, verdicts[1] != Verdict.MEMORIZED
        target, control = self.memorized.shares[stands].float(), self.others.shares[stays].float()
        if not len(target) or not len(control):
            return target, control
        points, own = (
            torch.cat([table.features[rows].float(), table.early_loss[rows, None].float()], 1)
            for rows in (table.index.find(self.memorized.ids[stands]), table.index.find(self.others.ids[stays]))
        )
        fellows = nearest(*standardize(points, own), FELLOWS)[0]
        return target, control[fellows.unique()]

    def _by_layer(self, shares: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.units, shares.split(list(self.units.values()), 1), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "units": self.units,
            "blocks": self.blocks,
            "rows": [asdict(row) for row in self.rows],
            "memorized": self.memorized.state_dict(),
            "others": self.others.state_dict(),
            "window": self._window.state_dict(),
            "sinks": None if self.sinks is None else _plain(self.sinks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the checkpoint's hidden layers are others than the model's, where these are known."""
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
        self._window.load_state_dict(state["window"])
        self.sinks = None if state["sinks"] is None else Sinks(**state["sinks"])


class _Newest:
    """The shares of the samples seen last, a row a sample: ``ids`` ``[R]``, signed ``shares`` ``[R, U]`` f16."""

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.shares = torch.zeros(0, 0, dtype=torch.float16)

    def put(self, ids: Tensor, shares: Tensor, most: int) -> None:
        """Newest first; of a sample that is there already, or twice in ``ids``, only the last visit stays."""
        if not len(ids):
            return
        old = ~torch.isin(self.ids, ids)
        fresh = [n for n, sample in enumerate(ids.tolist()) if not bool((ids[n + 1 :] == sample).any())][::-1]
        kept = self.shares[old] if len(self.ids) else shares.new_zeros(0, shares.shape[1]).half()
        self.ids = torch.cat([ids[fresh], self.ids[old]])[:most]
        self.shares = torch.cat([shares[fresh].half(), kept])[:most]

    def state_dict(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "shares": self.shares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.ids, self.shares = state["ids"], state["shares"]


class _Window:
    """Sums since the last evaluation, as tensors that are added to: by group where a group is named."""

    def __init__(self) -> None:
        self.looks = self.moves = 0
        self.sums: dict[str, Tensor] = {}

    def add(
        self,
        verdicts: Tensor,
        layers: Tensor,
        norms: Tensor | None,
        movement: Tensor | None,
        agreement: Tensor | None,
    ) -> None:
        self.looks += 1
        for group, verdict in GROUPS.items():
            rows = verdicts == verdict
            if rows.any():
                self._add(f"visits/{group}", rows.sum())
                self._add(f"shares/{group}", layers[rows].sum(0))
                if agreement is not None:
                    self._add(f"agreement/{group}", torch.stack([agreement[rows].sum(), rows.sum()]))
                if norms is not None:
                    squared = norms[rows].square()
                    self._add(f"norms/{group}", (squared / squared.sum(1, keepdim=True).clamp(min=1e-30)).sum(0))
        if norms is not None:
            self._add("gradient/all", norms.nansum(0))
            self._add("gradient/memorized", norms[verdicts == Verdict.MEMORIZED].nansum(0))
        if movement is not None:
            self.moves += 1
            self._add("movement", movement)

    def spread(self, step: int, concentration: Concentration | None) -> EvaluationProfile:
        visits = {group: int(self.sums[f"visits/{group}"]) for group in GROUPS if f"visits/{group}" in self.sums}
        means = {
            kind: {
                group: (self.sums[f"{kind}/{group}"] / count).tolist()
                for group, count in visits.items()
                if f"{kind}/{group}" in self.sums
            }
            for kind in ("shares", "norms")
        }
        none = torch.zeros(0)
        movement = self.sums.get("movement", none) / max(1, self.moves)
        part = self.sums.get("gradient/memorized", none) / self.sums.get("gradient/all", none).clamp(min=1e-30)
        agreement = {
            group: float(self.sums[f"agreement/{group}"][0] / self.sums[f"agreement/{group}"][1])
            for group in visits
            if f"agreement/{group}" in self.sums
        }
        return EvaluationProfile(
            step, visits, means["shares"], means["norms"], movement.tolist(), part.tolist(), concentration, agreement
        )

    def _add(self, name: str, values: Tensor) -> None:
        values = values.detach().double().cpu()
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks, "moves": self.moves, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.moves, self.sums = state["looks"], state["moves"], dict(state["sums"])


def _clustering(target: Tensor, control: Tensor) -> Concentration | None:
    if not len(target) or not len(control):
        return None
    permutations = MOST_PERMUTATIONS if target.shape[1] <= MANY_UNITS else FEW_PERMUTATIONS
    found = concentration_test(target, control, permutations)
    return found if isinstance(found, Concentration) else None


def _plain(sinks: Sinks) -> dict[str, Any]:
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
