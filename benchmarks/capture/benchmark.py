"""Compares every recorded loss with the sample's own, computed alone at the same weights: right, or refused by name.

The matrix has a case for each loss, layout, kind of batch and way to run that people use. Beside it, steps are drawn at
random. In each case that is right, a mitigation leaves half of the samples out, and its gradient is compared with brute
force.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.capture.case import Case
from benchmarks.capture.draws import draw_all
from benchmarks.capture.fitting import Outcome, run
from benchmarks.capture.gradients import check_gradients
from benchmarks.capture.matrix import MATRIX
from benchmarks.capture.page import HEAD
from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds

DRAWS, QUICK_DRAWS = 1000, 100
NOT_RUN = Outcome("not run")


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    case: Case
    training: Outcome
    validation: Outcome
    mitigation: Outcome

    def counts(self, *verdicts: str) -> bool:
        """Whether losses of training or of validation came to one of ``verdicts``."""
        return self.training.verdict in verdicts or self.validation.verdict in verdicts

    @property
    def is_right(self) -> bool:
        return all(each.verdict in ("right", "not run") for each in (self.training, self.validation, self.mitigation))

    @property
    def is_refused(self) -> bool:
        return not self.counts("silent wrong", "crashed") and not _unfit([self])

    @property
    def line(self) -> str:
        """What was said first; if something is wrong, of that."""
        stages = (self.training, self.validation, self.mitigation)
        order = sorted(stages, key=lambda each: each.verdict not in ("silent wrong", "crashed"))
        return next((each.line for each in order if each.line), "")


def examine(case: Case, seed: int) -> Result:
    """Fits a case's module, and again with a mitigation if its training was read."""
    outcomes = run(case, seed)
    weighed = case.weighable and outcomes["training"].verdict == "right"
    mitigation = check_gradients(case, seed) if weighed else NOT_RUN
    return Result(case, outcomes["training"], outcomes["validation"], mitigation)


def criteria(results: Sequence[Result], drawn: Sequence[Result], whole: bool) -> list[Criterion]:
    """``whole``: whether these are all cases, of which some may be refused."""
    mitigated = [each.mitigation.verdict for each in results if each.mitigation.verdict != "not run"]
    made = [
        Criterion("cases silently wrong", _share(results, "silent wrong", count=True), "<=", 0),
        Criterion("cases that crashed", _share(results, "crashed", count=True), "<=", 0),
        Criterion("mitigations of other samples than named", float(_unfit(results)), "<=", 0),
    ]
    if whole:
        made += [
            Criterion("cases", float(len(results)), ">=", 80),
            Criterion("share of cases refused", _share(results, "refused"), "<=", 0.25),
            Criterion("share of mitigations refused", mitigated.count("refused") / max(1, len(mitigated)), "<=", 0.05),
        ]
    if drawn:
        made += [
            Criterion("random steps silently wrong", _share(drawn, "silent wrong", count=True), "<=", 0),
            Criterion("random steps that crashed", _share(drawn, "crashed", count=True), "<=", 0),
            Criterion("mitigations of random steps, of other samples than named", float(_unfit(drawn)), "<=", 0),
        ]
    return made


def _share(results: Sequence[Result], verdict: str, count: bool = False) -> float:
    number = sum(each.counts(verdict) for each in results)
    return float(number) if count else number / max(1, len(results))


def _unfit(results: Iterable[Result]) -> int:
    return sum(each.mitigation.verdict in ("silent wrong", "crashed") for each in results)


def report(results: Sequence[Result], drawn: Sequence[Result], seed: int, whole: bool) -> Report:
    refused = sum(each.counts("refused") for each in results)
    wrong = sum(each.counts("silent wrong", "crashed") for each in [*results, *drawn])
    return Report(
        name="capture",
        tables=[by_kind(results, drawn), not_right(results), *([not_right(drawn, 20)] if drawn else [])],
        criteria=criteria(results, drawn, whole),
        figure=f"capture: {len(results)} cases and {len(drawn)} random steps, {wrong} wrong, {refused} cases refused",
        settings={
            "seed": seed,
            "cases": {
                each.case.name: [each.training.verdict, each.validation.verdict, each.mitigation.verdict]
                for each in results
            },
        },
    )


def by_kind(results: Sequence[Result], drawn: Sequence[Result]) -> Table:
    """How many of each kind came to which end."""
    table = Table(
        "kind", "cases", "training right", "refused", "validation right", "refused", "mitigation right", "wrong"
    )
    kinds = {case.kind: [each for each in results if each.case.kind == case.kind] for case in MATRIX.values()}
    for kind, some in [*kinds.items(), ("random steps", list(drawn))]:
        if some:
            stages = [Counter(getattr(each, stage).verdict for each in some) for stage in ("training", "validation")]
            read = [str(count[verdict]) for count in stages for verdict in ("right", "refused")]
            mitigated = sum(each.mitigation.verdict == "right" for each in some)
            wrong = sum(each.counts("silent wrong", "crashed") for each in some) + _unfit(some)
            table.add_row(kind, str(len(some)), *read, str(mitigated), str(wrong))
    return table


def not_right(results: Sequence[Result], most: int | None = None) -> Table:
    """The cases that are not right throughout, and why: those that are wrong first, ``most`` of them."""
    others = sorted((each for each in results if not each.is_right), key=lambda each: each.is_refused)
    table = Table("case", "training", "validation", "mitigation", "found")
    for each in others[:most]:
        stages = (each.training, each.validation, each.mitigation)
        table.add_row(each.case.name, *(stage.verdict for stage in stages), each.line)
    return table


def markdown(results: Sequence[Result]) -> str:
    """``docs/losses.md`` with a table of the cases: how each is read, in what unit, and what is refused."""
    lines = [
        "| case | unit | training | validation | mitigation | what is said |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kind = ""
    for each in results:
        if each.case.kind != kind:
            kind = each.case.kind
            lines.append(f"| **{kind}** | | | | | |")
        stages = (each.training, each.validation, each.mitigation)
        verdicts = ["" if stage.verdict == "not run" else stage.verdict for stage in stages]
        unit = "" if each.case.must_refuse else each.case.unit
        said = each.line.partition(" End ")[0]
        lines.append("| " + " | ".join(_cell(cell) for cell in (each.case.name, unit, *verdicts, said)) + " |")
    return "\n".join([*HEAD.rstrip().splitlines(), "", *lines])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("capture", __doc__.partition("\n")[0], seeds=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases with such a name; no random steps")
    parser.add_argument("--draws", type=int, help=f"random steps, default {DRAWS}, with --quick {QUICK_DRAWS}")
    parser.add_argument("--markdown", action="store_true", help="prints docs/losses.md instead")
    options = parser.parse_args(arguments_given)
    chosen = named(options.only, parser)
    first, *more = fresh_seeds(options)
    configure_process()
    results = [examine(case, seed) for seed in (first, *more) for case in chosen]
    if options.markdown:
        print(markdown(results[: len(chosen)]))
        return 0
    draws = steps_to_draw(options)
    drawn = [examine(one.case(), first) for one in (draw_all(draws, first) if draws else [])]
    return report(results, drawn, first, whole=not options.only).publish(options.json)


def named(names: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[Case]:
    """The cases of such ``names``, or whose name contains one that is no case's; all if there are none."""
    chosen = [
        case
        for case in MATRIX.values()
        if not names or any(name == case.name or (name not in MATRIX and name in case.name) for name in names)
    ]
    if not chosen:
        parser.error(f"no case has such a name; there are {', '.join(MATRIX)}")
    return chosen


def steps_to_draw(options: argparse.Namespace) -> int:
    if options.draws is not None:
        return int(options.draws)
    return 0 if options.only else QUICK_DRAWS if options.quick else DRAWS


if __name__ == "__main__":
    sys.exit(main())
