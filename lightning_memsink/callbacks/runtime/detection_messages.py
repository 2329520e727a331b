"""What a run can find, said at its start, and why its controls are of no use: each one line, with what to type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_memsink.callbacks.runtime.evaluation_schedule import EvaluationSchedule
from lightning_memsink.detection.control_pool import MOST_FIRST_VISITS, OLDEST
from lightning_memsink.detection.nomination import RANDOM_SHARE
from lightning_memsink.detection.statistics import controls_for, flagged_together, too_few_together

NOMINATED = 1 - RANDOM_SHARE
"""Share of a second look that is of samples which look memorized; the rest is a random sample."""
FIRST_EPOCHS = round(1 / OLDEST)
"""After so many epochs a first visit is too long ago to say what an unseen sample's loss would be."""
SHARES = (0.5, 0.25, 0.2, 0.1, 0.05, 0.02, 0.01)
HOLD_OUT = "Pass held-out data, trainer.fit(model, train_loader, val_loader), or memsink(control_fraction=0.1)."


@dataclass(frozen=True)
class DetectionFacts:
    """What is known before the first step. None: unknown (a stream has no length)."""

    samples: int | None
    """Of the training set, in all processes."""
    held_out: int | None
    """Controls that are never trained on; 0 if there are none."""
    schedule: EvaluationSchedule
    consecutive: int
    """Evaluations in a row that must flag a sample."""
    alpha: float
    controls_needed: int
    """Fewest controls that support a verdict."""
    recheck: int
    """Samples of a second look; 0 if there is none, or the data can't be fetched again."""
    takes_first_visits: bool = True
    """Whether first visits of training samples are controls."""
    most_controls: int = MOST_FIRST_VISITS
    """That samples are compared with."""
    evaluated: int = 0
    """Evaluations of the run that is resumed."""

    @property
    def few(self) -> float:
        """`too_few_together` at the end of the run."""
        return too_few_together(self.evaluations or 1)

    @property
    def evaluations(self) -> int | None:
        """Of the run in all."""
        left = self.schedule.evaluations
        return None if left is None else self.evaluated + left

    @property
    def has_few_held_out(self) -> bool:
        """Whether held-out samples alone support no verdict."""
        return self.held_out is not None and self.held_out < self.controls_needed

    @property
    def first_visits(self) -> int | None:
        """Controls that are first visits, in the first epoch."""
        return self.samples if self.takes_first_visits else 0

    @property
    def controls(self) -> int | None:
        """Of both kinds, as many as samples are compared with."""
        if self.held_out is None or self.first_visits is None:
            return None
        return min(self.most_controls, self.held_out + self.first_visits)

    @property
    def together(self) -> int | None:
        """How many memorized samples must be significant together to be flagged, at the smallest p-value."""
        if self.controls is None or self.samples is None:
            return None
        return flagged_together(self.samples, self.controls, self.alpha, self.few)


def start_message(facts: DetectionFacts) -> tuple[str, bool]:
    """What the run can find, and whether that is a warning: as it is set it can find nothing, or not for long."""
    obstacle = _without_controls(facts) or _few_evaluations(facts) or _few_controls(facts) or _narrow_search(facts)
    parts = [obstacle, _controls(facts), _evaluations(facts), _power(facts), _second_look(facts)]
    return " ".join(["memsink:", *filter(None, parts)]), bool(obstacle)


def equal_controls(controls: int, loss: float) -> str:
    """The losses of all controls are equal, or nearly so; ``loss`` is their median."""
    return (
        f"memsink: the losses of {controls:,} controls are all equal ({loss:.4g}): they can't tell samples apart, and "
        "no sample gets a verdict. Does the model's output depend on its input, and has it learned anything? If so, "
        "validate on held-out samples that differ as those of training do."
    )


def too_few_controls(usable: int, needed: int) -> str:
    """Fewer controls of any kind have a finite loss than support a verdict."""
    return (
        f"memsink: {usable:,} controls with a finite loss, and {needed} are needed: samples stay undecided. {HOLD_OUT}"
    )


def trained_controls(trained: int, controls: int, needed: int) -> str:
    """Some controls have the content of training samples; ``needed``: fewest that support a verdict."""
    rest = controls - trained
    number = f"{trained:,} of {controls:,}" if rest else f"all {controls:,}"
    left = (
        f"Samples are compared with the {rest:,} others." if rest >= needed else "Too few others are left for verdicts."
    )
    return (
        f"memsink: {number} controls have the content of training samples (the same input; labels don't count), so "
        f"their losses don't say what unseen samples would get. They are left out. {left} Take them out of the "
        "validation set or the training set, or hold samples out by memsink(control_fraction=0.1)."
    )


def _without_controls(facts: DetectionFacts) -> str:
    if facts.held_out == 0 and not facts.first_visits and facts.first_visits is not None:
        return f"there are no controls, so every sample stays undecided. {HOLD_OUT}"
    return ""


def _few_evaluations(facts: DetectionFacts) -> str:
    """Fewer evaluations than must flag a sample in a row."""
    evaluations = facts.evaluations
    if evaluations is None or evaluations >= facts.consecutive:
        return ""
    found = ["no evaluation takes place", "only one evaluation takes place"]
    many = found[evaluations] if evaluations < 2 else f"only {evaluations} evaluations take place"
    rule = f"and a sample is memorized when {facts.consecutive} in a row flag it: " if facts.consecutive > 1 else ""
    if not facts.schedule.is_enabled:
        return f"{many}, {rule}nothing can be found. {HOLD_OUT}"
    setting = more_evaluations(facts.schedule, facts.evaluated, facts.consecutive)
    one = f", or MemorizationDetector(consecutive={evaluations})" if evaluations else ""
    return f"{many}, {rule}nothing can be found. Set {setting}{one}."


def more_evaluations(schedule: EvaluationSchedule, evaluated: int, consecutive: int) -> str:
    """The smallest change by which there are twice as many evaluations as must flag a sample in a row, or as many."""
    for wanted in (2 * consecutive, consecutive):
        for setting, changed in _settings(schedule, wanted):
            if evaluated + (changed.evaluations or 0) >= wanted:
                return setting
    return "a larger Trainer(max_epochs=...)" if schedule.epochs is not None else "a larger Trainer(max_steps=...)"


def _settings(schedule: EvaluationSchedule, wanted: int) -> Iterator[tuple[str, EvaluationSchedule]]:
    """Settings with more evaluations than ``schedule`` has, the smallest change first."""
    batches = schedule.batches_in_all
    if schedule.own_every is not None:
        every = max(1, (batches or 0) // (schedule.accumulate or 1) // wanted)
        yield f"LossTracker(control_every={every})", replace(schedule, own_every=every)
        return
    for epochs in range((schedule.every_epochs or 1) - 1, 0, -1):
        yield f"Trainer(check_val_every_n_epoch={epochs})", replace(schedule, every_epochs=epochs)
    if schedule.batches is not None:
        epochs = schedule.every_epochs or 1
        same = "" if epochs == 1 else ", check_val_every_n_epoch=1"
        for share in SHARES:
            every = max(1, int(schedule.batches * share))
            yield (
                f"Trainer(val_check_interval={share:g}{same})",
                replace(schedule, every_epochs=1, every_batches=every),
            )
    if batches:
        every = max(1, batches // wanted)
        changed = replace(schedule, every_epochs=None, every_batches=every)
        yield f"Trainer(val_check_interval={every}, check_val_every_n_epoch=None)", changed


def _few_controls(facts: DetectionFacts) -> str:
    """Controls that support no verdict, or none after the first epochs."""
    if not facts.has_few_held_out:
        return ""
    few = f"fewer than {facts.controls_needed} held-out controls"
    if facts.controls is not None and facts.controls < facts.controls_needed:
        return f"{few} support no verdict, so every sample stays undecided. {HOLD_OUT}"
    epochs = facts.schedule.epochs
    if facts.takes_first_visits and (epochs is None or epochs > FIRST_EPOCHS):
        return f"with {few} there are verdicts in the first {FIRST_EPOCHS} epochs only. {HOLD_OUT}"
    return ""


def _narrow_search(facts: DetectionFacts) -> str:
    """More samples must be significant together than there are, or than a second look has places for."""
    together, samples = facts.together, facts.samples
    if not together or not samples:
        return ""
    places = samples if not facts.recheck else min(samples, max(1, int(NOMINATED * facts.recheck)))
    needed = controls_for(samples, facts.alpha, places, facts.few)
    if together > samples:
        return f"so few controls can't flag anything at a false-discovery rate of {facts.alpha:g}. {_more(needed)}"
    if 0 < facts.recheck < samples and together > places:
        recheck = math.ceil(together / NOMINATED / 0.9)
        more = f", or {_more(needed, 'give')}" if needed <= facts.most_controls else ""
        return (
            f"{together:,} samples must be significant together, and a second look at {facts.recheck:,} can't find so "
            f"many: nothing can be flagged. Set MemorizationDetector(recheck={min(recheck, samples)}){more}"
            f"{'' if more else '.'}"
        )
    return ""


def _more(controls: int, verb: str = "Give") -> str:
    return f"{verb} the validation loader at least {controls:,} held-out samples of the kinds that are trained on."


def _controls(facts: DetectionFacts) -> str:
    """Numbers of samples and of controls of each kind."""
    samples = "A stream of samples" if facts.samples is None else _count(facts.samples, "sample")
    kinds = []
    if facts.held_out is None:
        kinds.append("a stream of held-out controls")
    elif facts.held_out:
        kinds.append(_count(facts.held_out, "held-out control"))
    if facts.takes_first_visits:
        kinds.append(f"first visits of samples as controls in the first {FIRST_EPOCHS} epochs")
    total = None if facts.held_out is None or facts.first_visits is None else facts.held_out + facts.first_visits
    bounded = (
        f", {facts.most_controls:,} of them at a time" if total is not None and total > facts.most_controls else ""
    )
    return f"{samples}; {' and '.join(kinds) or 'no controls'}{bounded}."


def _evaluations(facts: DetectionFacts) -> str:
    evaluations = facts.evaluations
    if evaluations is not None and evaluations < facts.consecutive:
        return ""
    number = "An unknown number of evaluations" if evaluations is None else f"Up to {_count(evaluations, 'evaluation')}"
    in_a_row = "one that flags it" if facts.consecutive == 1 else f"{facts.consecutive} in a row that flag it"
    return f"{number}; a sample is memorized after {in_a_row}."


def _power(facts: DetectionFacts) -> str:
    """The smallest p-value, and what it allows."""
    controls, together, samples = facts.controls, facts.together, facts.samples
    if not controls:
        return ""
    smallest = f"Smallest p-value 1/{controls + 1:,}"
    if together is None or not samples:
        return f"{smallest}."
    if together == 1:
        return f"{smallest}: a single memorized sample can be flagged at a false-discovery rate of {facts.alpha:g}."
    return (
        f"{smallest}: at a false-discovery rate of {facts.alpha:g} at least {together:,} memorized samples must be "
        f"significant together, for a single one {controls_for(samples, facts.alpha, few=facts.few):,} controls."
    )


def _second_look(facts: DetectionFacts) -> str:
    if not facts.recheck:
        return "Samples are judged by their last visits."
    if facts.samples is not None and facts.samples <= facts.recheck:
        return "Each evaluation measures all samples again."
    return f"Each evaluation measures up to {facts.recheck:,} samples again."


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
