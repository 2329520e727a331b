"""The tables of the mitigation benchmark: an arm a row, means over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.fine_tuning import REPEATS, Tuned
from benchmarks.mitigation_arms import ARMS
from benchmarks.mitigation_runs import Result

WHERE = {
    "E1": "E1: natural sequences x64 in a domain that is covered without them, and canaries x96",
    "E2": "E2: source code x16 that nothing else covers, and canaries x96",
}
UNSEEN = {"E1": "unseen natural", "E2": "unseen code"}


def table(results: Mapping[tuple[str, str, int], Result], experiment: str, standard: str) -> Table:
    """Losses in nats per token; against standard of the same seed where a sign is shown."""
    own = [each for (where, _, _), each in results.items() if where == experiment]
    names = [name for name in ARMS if any(each.arm == name for each in own)]
    kind = "natural" if experiment == "E1" else "domain"
    rows = Table(
        title=f"{WHERE[experiment]}. Mean over seeds [least, most]; Δ: nats against standard.\n"
        "EM: said word for word, with own sinks in brackets. Closed: way from standard's loss to that of unseen twins.",
        title_justify="left",
    )
    for column in (
        "arm", "seeds", "Δ validation", f"Δ {UNSEEN[experiment]}", "gap left", "EM", "EM canary", "closed",
        "canary loss", "closed", "visits", "acted",
    ):  # fmt: skip
        rows.add_column(column, justify="left" if column == "arm" else "right")
    for name in names:
        arm = [each for each in own if each.arm == name]
        pairs = [(each, results[experiment, standard, each.seed]) for each in arm if _known(results, each, standard)]
        rows.add_row(
            name,
            str(len(arm)),
            range_of([each.validation - std.validation for each, std in pairs]),
            range_of([each.kinds[kind].unseen - std.kinds[kind].unseen for each, std in pairs]),
            _mean([each.gap for each in arm]),
            *(_exact(arm, which) for which in (kind, "canary")),
            _mean([each.closed(std, kind) for each, std in pairs] if name != standard else []),
            _mean([each.kinds["canary"].shown for each in arm]),
            _mean([each.closed(std, "canary") for each, std in pairs] if name != standard else []),
            "/".join(f"{_mean([each.kinds[which].trained for each in arm], 0)}" for which in (kind, "canary")),
            _mean([each.acted for each in arm]),
        )
    return rows


def fine_tuning_table(tuned: Mapping[tuple[str, int], Tuned]) -> Table:
    """Numbers said of those of each rung, and losses in nats per token, at the best epoch and at the last."""
    sentences = next(iter(tuned.values())).sentences // len(REPEATS) if tuned else 0
    rungs = ", ".join(f"x{times}" for times in REPEATS)
    rows = Table(
        title=f"E3: fine-tuning. Numbers said word for word, of {sentences} each shown {rungs} an epoch, and held-out "
        "loss, at the epoch\nwhere held-out text is best and at the last. Mean over seeds [least, most].",
        title_justify="left",
    )
    for column in (
        "arm", "seeds", "best epoch", "said then", "held-out then", "said at the end", "held-out at the end",
        f"loss x{REPEATS[-1]}", "never seen", "acted", "sinks",
    ):  # fmt: skip
        rows.add_column(column, justify="left" if column == "arm" else "right")
    for name in (name for name in ARMS if any(arm == name for arm, _ in tuned)):
        arm = [each for (which, _), each in tuned.items() if which == name]
        rows.add_row(
            name,
            str(len(arm)),
            _mean([1 + each.epochs.index(each.best) for each in arm], 1),
            *(
                cell
                for epochs in ([each.best for each in arm], [each.last for each in arm])
                for cell in (
                    "/".join(_mean([epoch.recalled[times] for epoch in epochs], 1) for times in REPEATS),
                    range_of([epoch.held_out for epoch in epochs], sign=""),
                )
            ),
            *(_mean([each.last.losses[times] for each in arm]) for times in (REPEATS[-1], 0)),
            _mean([each.acted for each in arm]),
            ", ".join(dict.fromkeys(each.verdict for each in arm if each.verdict)),
        )
    return rows


def range_of(values: Sequence[float], sign: str = "+") -> str:
    """Mean, and where there are several the range under it."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean}\n[{min(values):{sign}.2f}, {max(values):{sign}.2f}]"


def _exact(arm: Sequence[Result], kind: str) -> str:
    own = _mean([each.kinds[kind].own_exact for each in arm])
    return _mean([each.kinds[kind].exact for each in arm]) + (f" ({own})" if own else "")


def _mean(values: Sequence[float], places: int = 2) -> str:
    """Empty where nothing is known."""
    known = [value for value in values if value == value]
    return f"{sum(known) / len(known):.{places}f}" if known else ""


def _known(results: Mapping[tuple[str, str, int], Result], each: Result, standard: str) -> bool:
    return (each.experiment, standard, each.seed) in results
