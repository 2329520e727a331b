"""What a mitigation did and what memorization did meanwhile: series for loggers, sentences for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.intervention_log import LEVELS, InterventionLog
from lightning_memsink.reporting.formatting import percent

PREFIX = "mitigation/"


def action_series(interventions: Mapping[str, InterventionLog]) -> dict[str, float]:
    """``mitigation/NAME/…`` of the last evaluation, per mitigation: the share of sample visits ``acted`` on since the
    evaluation before, the share ``removed`` (of the gradient, say), the ``set_point`` of `hold` in nats, and every
    other count as a share of visits.
    """
    series: dict[str, float] = {}
    for name, log in interventions.items():
        if not log.records or not log.records[-1]["visits"]:
            continue
        last = log.records[-1]
        for key, value in last.items():
            if key not in ("step", "visits"):
                series[f"{PREFIX}{name}/{key}"] = value if key in LEVELS else value / last["visits"]
    return series


def side_by_side(row: Mapping[str, float]) -> dict[str, float]:
    """Gap and held-out loss once more under ``mitigation/``, so that loggers draw them beside `action_series`."""
    sources = {"gap_of_top_percent": "gap_of_top_percent", "validation_loss": "control_loss"}
    return {f"{PREFIX}{name}": row[source] for name, source in sources.items() if source in row}


def what_was_done(interventions: Mapping[str, InterventionLog], certificate: Certificate | None) -> list[str]:
    """One or two sentences per mitigation, and the result of the certificate of designed sinks."""
    lines = []
    for name, log in interventions.items():
        visits = log.total("visits")
        if not visits:
            lines.append(f"{name} {log.description}: there was no batch that it could act on.")
            continue
        acted = log.total("acted") / visits
        lines.append(
            f"{name} {log.description}: it acted on {percent(acted)} of {visits:,.0f} sample visits"
            f"{_at_the_end(log, acted)} and removed {percent(log.total('removed'))} of the {log.unit}."
        )
        lines += _set_points(log)
        unmatched = log.total("unmatched") / visits
        if unmatched:
            lines.append(f"It did not act on {percent(unmatched)} of visits, which had no matched control.")
    if certificate is not None:
        lines.append(certificate.words())
    if lines:
        lines.append(
            "To see what this cost, compare with a run of the same seed without mitigation (--memsink.mitigation=null)."
        )
    return lines


def acted_shares(history: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """``(step, share of visits acted on)`` of every evaluation, by mitigation."""
    shares: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(PREFIX) and key.endswith("/acted"):
                shares.setdefault(key.removeprefix(PREFIX).removesuffix("/acted"), []).append((row["step"], value))
    return shares


def _set_points(log: InterventionLog) -> list[str]:
    """Between which values a set point that is measured in the run has moved."""
    moved = [record["set_point"] for record in log.records if "set_point" in record]
    if len({round(each, 2) for each in moved}) < 2:
        return []
    ends = f"between {min(moved):.2f} and {max(moved):.2f} nats"
    return [f"Its set point moved with the run, {ends}; it was {moved[-1]:.2f} at the end."]


def _at_the_end(log: InterventionLog, overall: float) -> str:
    """The last evaluation's share, if it differs from the whole run's: there may be more to act on late in training."""
    last = log.records[-1]
    share = last["acted"] / last["visits"] if last["visits"] else overall
    return f" ({percent(share)} at the end)" if abs(share - overall) > 0.01 else ""
