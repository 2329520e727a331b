"""Counts what a mitigation did, one record per evaluation. Only loggers and reports read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_memsink._distributed import gather, is_first

LEVELS = ("removed", "set_point")
"""Of a record, what is no count: the share removed, and the set point of `hold` in nats."""


class InterventionLog:
    """The interventions of one mitigation: visits, samples acted on, and the share removed.

    With several processes, each counts its own batches, and `close_evaluation` adds the counts up. Of the counts since
    the last evaluation, a checkpoint holds those of the first process.

    Args:
        description: a predicate for the report: "leaves out the gradient of samples that ...".
        unit: names what ``removed`` is a share of: "gradient", "units", "tokens".

    >>> log = InterventionLog("leaves samples out", "gradient")
    >>> log.add(visits=8, acted=2, removed=0.25)
    >>> log.close_evaluation(step=10)
    >>> log.records
    [{'step': 10.0, 'visits': 8.0, 'acted': 2.0, 'removed': 0.25}]
    """

    def __init__(self, description: str, unit: str) -> None:
        self.description, self.unit = description, unit
        self.records: list[dict[str, float]] = []
        """One per evaluation: its ``step``, and since the previous record the ``visits`` of samples, how many of these
        were ``acted`` on, the mean share ``removed``, the further counts, and the levels (`LEVELS`)."""
        self.latest_step = -1
        """The step of the last evaluation that was closed, whether or not a batch was counted; -1 before the first."""
        self.by_source: dict[str, int] = {}
        """Visits acted on, by label of the source, up to the last evaluation; of mitigations that count these."""
        self._steps = 0
        self._open: dict[str, float] = {}
        self._open_by_source: dict[str, int] = {}

    def add(self, visits: int, acted: int, removed: float, **more: int) -> None:
        """Counts one training batch. ``removed``: a share, 0…1. ``more``: further counts of samples, by name."""
        self._steps += 1
        for name, value in {"visits": visits, "acted": acted, "removed": removed, **more}.items():
            self._open[name] = self._open.get(name, 0) + value

    def add_by_source(self, labels: Iterable[str | None]) -> None:
        """Counts the sources of the samples acted on in one training batch; None for a sample without one."""
        _add(self._open_by_source, Counter(label for label in labels if label is not None))

    def close_evaluation(self, step: int, **levels: float) -> None:
        """Adds a record of the batches since the last evaluation, and of the ``levels`` that were acted by. Every
        process calls it: the counts are gathered."""
        self.latest_step = step
        gathered = gather((self._steps, self._open, self._open_by_source))
        self._steps, self._open, self._open_by_source = 0, {}, {}
        steps, record = sum(steps for steps, *_ in gathered), dict[str, float]()
        for _, counts, by_source in gathered:
            for name, value in counts.items():
                record[name] = record.get(name, 0.0) + value
            _add(self.by_source, by_source)
        if steps:
            self.records.append({"step": float(step), **record, "removed": record["removed"] / steps, **levels})

    def total(self, name: str) -> float:
        """A count over the whole run so far: the sum, or for ``removed`` the mean weighted by visits."""
        if name == "removed":
            weighted = sum(record["removed"] * record["visits"] for record in self.records)
            return weighted / max(1.0, self.total("visits"))
        return sum(record.get(name, 0.0) for record in self.records)

    def state_dict(self) -> dict[str, Any]:
        return {
            "records": [dict(record) for record in self.records],
            "latest_step": self.latest_step,
            "steps": self._steps,
            "open": dict(self._open),
            "by_source": dict(self.by_source),
            "open_by_source": dict(self._open_by_source),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records[:] = [dict(record) for record in state["records"]]
        last = int(self.records[-1]["step"]) if self.records else -1
        self.latest_step = state.get("latest_step", last)  # version 0.1.0 saved none, and no sources
        self.by_source = dict(state.get("by_source", {}))
        if is_first():  # the counts of the first process, restored once
            self._steps, self._open = state["steps"], dict(state["open"])
            self._open_by_source = dict(state.get("open_by_source", {}))


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, value in more.items():
        counts[name] = counts.get(name, 0) + value
