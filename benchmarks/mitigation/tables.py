"""The tables of the mitigation benchmark: an arm a row, means over its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.mitigation.arms import ARMS, STANDARD
from benchmarks.mitigation.fine_tuning import REPEATS, Tuned
from benchmarks.mitigation.ordinary import Ordinary
from benchmarks.mitigation.runs import Result

TITLES = {
    "E1": "E1: natural sequences x64 in a domain that is covered without them, and canaries x128.",
    "E2": "E2: source code x16 that nothing else covers, and canaries x128.",
}
NOTE = (
    "Mean over seeds [least, most], one seed where there is no range. Δ: nats against standard, of text never shown. "
    "Gap: nats from the repeated text to unseen text like it. EM: said word for word, repeated/canary; with own sinks "
    "on. Closed: way from standard's loss to that of unseen twins, repeated/canary. Visits: those that trained."
)


def table(results: Mapping[tuple[str, str, int], Result], experiment: str) -> Table:
    """Losses in nats per token; those of the same seed are compared."""
    rows = _bare(
        f"{TITLES[experiment]} {NOTE}",
        *("arm", "Δ validation", "Δ repeated\nkind", "gap", "EM", "own EM", "closed", "canary\nloss", "visits"),
    )
    for name in ARMS:
        arm = [each for (where, which, _), each in results.items() if (where, which) == (experiment, name)]
        if not arm:
            continue
        kinds = arm[0].repeated, "canary"
        rivals = [(each, results.get((experiment, STANDARD, each.seed))) for each in arm]
        pairs = [(each, standard) for each, standard in rivals if standard is not None]
        rows.add_row(
            name,
            range_of([each.validation - standard.validation for each, standard in pairs]),
            range_of([each.kinds[kinds[0]].unseen - standard.kinds[kinds[0]].unseen for each, standard in pairs]),
            mean([each.gap for each in arm]),
            both(mean([each.kinds[kind].exact for each in arm]) for kind in kinds),
            both(mean([each.kinds[kind].own_exact for each in arm]) for kind in kinds),
            both(mean([each.closed(standard, kind) for each, standard in pairs]) for kind in kinds),
            mean([each.kinds["canary"].shown for each in arm]),
            both(mean([each.kinds[kind].trained for each in arm], 0) for kind in kinds),
        )
    return rows


def fine_tuning_table(tuned: Mapping[tuple[str, int], Tuned]) -> Table:
    """Numbers recalled in each group, and losses in nats per token, at the best epoch and at the last."""
    sentences = next(iter(tuned.values())).sentences // len(REPEATS) if tuned else 0
    repeats = ", ".join(f"x{times}" for times in REPEATS)
    rows = _bare(
        f"E3: fine-tuning. Numbers said verbatim, of {sentences} each shown {repeats} an epoch, and held-out loss, "
        "at the epoch where that is lowest (the best that stopping early can do) and at the last. Mean over seeds "
        "[least, most].",
        *("arm", "best\nepoch", "said\nthen", "held-out\nthen", "said at\nthe end", "held-out at\nthe end"),
        *(f"loss\nx{REPEATS[-1]}", "never\nshown", "sinks"),
    )
    for name in ARMS:
        arm = [each for (which, _), each in tuned.items() if which == name]
        if not arm:
            continue
        rows.add_row(
            name,
            mean([1 + each.epochs.index(each.best) for each in arm], 0),
            *(
                cell
                for epochs in ([each.best for each in arm], [each.last for each in arm])
                for cell in (
                    both(mean([epoch.recalled[times] for epoch in epochs], 1) for times in REPEATS),
                    range_of([epoch.held_out for epoch in epochs], sign=""),
                )
            ),
            *(mean([each.last.losses[times] for each in arm]) for times in (REPEATS[-1], 0)),
            ", ".join(dict.fromkeys(each.verdict for each in arm if each.verdict)),
        )
    return rows


def ordinary_table(found: Mapping[tuple[str, int], Ordinary]) -> Table:
    """Losses of unseen text, in nats per token, at the best epoch and at the last."""
    rows = _bare(
        "E4: ordinary training over epochs, nothing planted. Held-out loss of unseen text at the epoch where it is "
        "lowest and at the last. Δ: against standard. Mean over seeds [least, most].",
        *("arm", "best\nepoch", "held-out\nthen", "Δ", "held-out at\nthe end", "Δ", "acted on\nvisits", "set point"),
    )
    for name in ARMS:
        pairs = [
            (each, found[STANDARD, seed])
            for (which, seed), each in found.items()
            if which == name and (STANDARD, seed) in found
        ]
        if not pairs:
            continue
        rows.add_row(
            name,
            mean([1 + each.held_out.index(each.best) for each, _ in pairs], 0),
            range_of([each.best for each, _ in pairs], sign=""),
            range_of([each.best - standard.best for each, standard in pairs]),
            range_of([each.last for each, _ in pairs], sign=""),
            range_of([each.last - standard.last for each, standard in pairs]),
            mean([each.acted for each, _ in pairs]),
            mean([each.set_point for each, _ in pairs]),
        )
    return rows


def range_of(values: Sequence[float], sign: str = "+") -> str:
    """Mean, and where there are several the range under it.

    >>> range_of([-0.12, -0.1])
    '-.110\\n[-.12, -.10]'
    """
    if not values:
        return ""
    average = _short(f"{sum(values) / len(values):{sign}.3f}")
    ends = ", ".join(_short(f"{end:{sign}.2f}") for end in (min(values), max(values)))
    return average if len(values) == 1 else f"{average}\n[{ends}]"


def mean(values: Sequence[float], places: int = 2) -> str:
    """Mean of the values that are not NaN; empty if there are none."""
    known = [value for value in values if value == value]
    return _short(f"{sum(known) / len(known):.{places}f}") if known else ""


def both(cells: Iterable[str]) -> str:
    """Several numbers in one cell; empty if one is unknown."""
    known = list(cells)
    return "/".join(known) if all(known) else ""


def _short(number: str) -> str:
    """``number`` without the zero before the point."""
    return number.replace("0.", ".", 1) if number.lstrip("+-").startswith("0.") else number


def _bare(title: str, *columns: str) -> Table:
    rows = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in columns:
        rows.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "sinks")
    return rows
