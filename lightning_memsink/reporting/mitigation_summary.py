"""What was done about memorization, and what it went with: series for the curves, sentences for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.intervention_log import InterventionLog

PREFIX = "mitigation/"


def action_series(actions: Mapping[str, InterventionLog], step: int) -> dict[str, float]:
    """``mitigation/…`` at the evaluation of ``step``: by mitigation the share of sample visits ``acted`` on since the
    evaluation before, the share ``removed`` (of the gradient, say), and all else that was counted, as shares of visits.
    """
    series: dict[str, float] = {}
    for name, done in actions.items():
        if not done.records or not done.records[-1]["visits"]:
            continue
        last = done.records[-1]
        counted = {key: value / last["visits"] for key, value in last.items() if key not in ("step", "visits")}
        series |= {f"{PREFIX}{name}/{key}": value for key, value in {**counted, "removed": last["removed"]}.items()}
    return series


def side_by_side(row: Mapping[str, float]) -> dict[str, float]:
    """The gap and its price once more under ``mitigation/``, where loggers draw them beside what was done."""
    told = {"gap_of_top_percent": "gap_of_top_percent", "validation_loss": "control_loss"}
    return {f"{PREFIX}{name}": row[source] for name, source in told.items() if source in row}


def what_was_done(actions: Mapping[str, InterventionLog], certificate: Certificate | None) -> list[str]:
    """A sentence or two a mitigation, and what the certificate of designed sinks says."""
    lines = []
    for name, done in actions.items():
        visits = done.total("visits")
        if not visits:
            lines.append(f"{name} {done.description}: it saw no batch it could act on.")
            continue
        acted = done.total("acted") / visits
        lines.append(
            f"{name} {done.description}: it acted on {_percent(acted)} of {visits:,.0f} sample visits"
            f"{_lately(done, acted)} and removed {_percent(done.total('removed'))} of the {done.unit}."
        )
        alone = done.total("unmatched") / visits
        if alone:
            lines.append(f"{_percent(alone)} of visits had no matched control and were left alone.")
    if certificate is not None:
        lines.append(certificate.words())
    if lines:
        lines.append("What that cost is seen beside a run without it: same seed, --memsink.mitigation=null.")
    return lines


def acting_rows(history: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """``(step, share of visits acted on)`` by mitigation."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(PREFIX) and key.endswith("/acted"):
                rows.setdefault(key.removeprefix(PREFIX).removesuffix("/acted"), []).append((row["step"], value))
    return rows


def _lately(done: InterventionLog, overall: float) -> str:
    """Where the end differs from the whole: a mitigation that follows memorization has more to do late."""
    last = done.records[-1]
    share = last["acted"] / last["visits"] if last["visits"] else overall
    return f" ({_percent(share)} at the end)" if abs(share - overall) > 0.01 else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
