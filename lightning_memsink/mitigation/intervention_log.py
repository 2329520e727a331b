"""What a mitigation did: counted as batches pass, a record an evaluation. Logs and reports read it, nobody else."""

from __future__ import annotations

from typing import Any

from lightning_memsink._distributed import gather, is_first


class InterventionLog:
    """One mitigation's.

    ``description`` is a sentence for the report: "leaves out the gradient of samples that ...". ``unit`` names what
    ``removed`` is a share of: "gradient", "units", "tokens". In several processes each counts its own batches, and
    `close_evaluation` adds them up; a checkpoint holds of what was counted since then the first process's part.

    >>> log = InterventionLog("leaves samples out", "gradient")
    >>> log.add(visits=8, acted=2, removed=0.25)
    >>> log.close_evaluation(step=10)
    >>> log.records
    [{'step': 10.0, 'visits': 8.0, 'acted': 2.0, 'removed': 0.25}]
    """

    def __init__(self, description: str, unit: str) -> None:
        self.description, self.unit = description, unit
        self.records: list[dict[str, float]] = []
        """``visits`` of samples and how many were ``acted`` on since the record before, the mean share ``removed``, and
        whatever else was counted."""
        self.latest_step = -1
        """Of the last evaluation that was closed, whether or not any batch had been counted."""
        self._steps = 0
        self._open: dict[str, float] = {}

    def add(self, visits: int, acted: int, removed: float, **more: int) -> None:
        """One training batch. ``removed``: 0…1; ``more``: further counts of samples, by name."""
        self._steps += 1
        for name, value in {"visits": visits, "acted": acted, "removed": removed, **more}.items():
            self._open[name] = self._open.get(name, 0) + value

    def close_evaluation(self, step: int) -> None:
        """Adds up what was counted since the evaluation before. Every process calls it: the counts are gathered."""
        self.latest_step = step
        everyone = gather((self._steps, self._open))
        self._steps, self._open = 0, {}
        steps, record = sum(taken for taken, _ in everyone), dict[str, float]()
        for _, counted in everyone:
            for name, value in counted.items():
                record[name] = record.get(name, 0.0) + value
        if steps:
            self.records.append({"step": float(step), **record, "removed": record["removed"] / steps})

    def total(self, name: str) -> float:
        """Over the whole run so far: a sum, or for ``removed`` the mean weighed by visits."""
        if name == "removed":
            weighed = sum(record["removed"] * record["visits"] for record in self.records)
            return weighed / max(1.0, self.total("visits"))
        return sum(record.get(name, 0.0) for record in self.records)

    def state_dict(self) -> dict[str, Any]:
        return {
            "records": [dict(record) for record in self.records],
            "latest_step": self.latest_step,
            "steps": self._steps,
            "open": dict(self._open),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records[:] = [dict(record) for record in state["records"]]
        last = int(self.records[-1]["step"]) if self.records else -1
        self.latest_step = state.get("latest_step", last)  # version 0.1.0 saved none
        if is_first():  # what it had counted, once
            self._steps, self._open = state["steps"], dict(state["open"])
