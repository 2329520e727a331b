"""The checks of `lightning_memsink.testing` find a class that breaks each rule, and name the rule."""

import random
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lightning_memsink import Ledger
from lightning_memsink.localization.localizers import METHODS
from lightning_memsink.testing import (
    callback_checks,
    check_callback,
    check_localizer,
    check_mitigation,
    localizer_checks,
)


class Harmless(Callback):
    """Counts its steps, requires what it reads, and keeps every rule."""

    def __init__(self):
        self.steps = 0

    def on_train_start(self, trainer, pl_module):
        Ledger.of(trainer).require(Ledger.losses, Ledger.flags)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


class LeaksHook(Callback):
    """Removes its hook in teardown, which Lightning calls after success only."""

    def on_fit_start(self, trainer, pl_module):
        self.handle = pl_module.mlp.register_forward_hook(lambda *_: None)

    def teardown(self, trainer, pl_module, stage):
        self.handle.remove()


class LeaksOptimizerHook(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: None)


class LeaksOnInterrupt(LeaksHook):
    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, Exception):
            self.handle.remove()


class LeaksAttribute(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.train_dataloader.mark = True


class ChangesWeights(Callback):
    """As clipping without a copy does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        next(pl_module.parameters()).grad.mul_(0.999)


class DrawsNumbers(Callback):
    draws = staticmethod(lambda: torch.rand(1))

    def on_train_end(self, trainer, pl_module):
        self.draws()


class DrawsFromNumpy(DrawsNumbers):
    draws = staticmethod(np.random.rand)


class DrawsFromPython(DrawsNumbers):
    draws = staticmethod(random.random)


class UnsafeState(Harmless):
    def state_dict(self):
        return {"steps": np.random.default_rng(0)}


class LosesState(Harmless):
    def load_state_dict(self, state_dict):
        pass


class ForgetsState(Harmless):
    """Its counter is not saved, and later steps depend on it."""

    state_dict = Callback.state_dict
    load_state_dict = Callback.load_state_dict

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        next(pl_module.parameters()).grad.mul_(1 / (1 + self.steps))


class ReadsTooEarly(Callback):
    """In the hook in which the slot is written."""

    def on_fit_start(self, trainer, pl_module):
        _ = Ledger.of(trainer).losses


class ReadsInTheWritersHook(Harmless):
    """What it counts depends on whether MemorizationDetector came first."""

    def on_validation_epoch_end(self, trainer, pl_module):
        flags = Ledger.of(trainer).flags
        self.steps += 1000 * len(flags.evaluations)


class RequiresTooLate(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        _ = Ledger.of(trainer).losses


class NamesNothing(Callback):
    def on_train_start(self, trainer, pl_module):
        if Ledger.of(trainer).get(Ledger.losses) is None:
            raise RuntimeError("something is missing")


class HoldsLambda(Callback):
    def __init__(self):
        self.function = lambda: None


class TrustsLogger(Callback):
    def on_train_end(self, trainer, pl_module):
        for logger in trainer.loggers:
            logger.log_metrics({"steps": 1}, step=trainer.global_step)


HOOKS = "Hooks are removed however training ends"
RANDOM = "Global random generators are left alone"
BROKEN = [
    (LeaksHook, callback_checks.check_hooks_are_removed, HOOKS, r"after RuntimeError, mlp\._forward_hooks \(1\)"),
    (LeaksOnInterrupt, callback_checks.check_hooks_are_removed, HOOKS, "after KeyboardInterrupt, mlp"),
    (LeaksOptimizerHook, callback_checks.check_hooks_are_removed, HOOKS, r"after success, optimizer\."),
    (LeaksAttribute, callback_checks.check_hooks_are_removed, HOOKS, r"loader\.mark"),
    (ChangesWeights, callback_checks.check_weights_are_unchanged, "Watching changes no weight", r"embed\.weight"),
    (
        ChangesWeights,
        callback_checks.check_idle_mitigation_changes_no_weight,
        "An idle mitigation changes no weight",
        r"embed\.weight",
    ),
    (DrawsNumbers, callback_checks.check_random_state_is_unchanged, RANDOM, "torch"),
    (DrawsFromNumpy, callback_checks.check_random_state_is_unchanged, RANDOM, "numpy"),
    (DrawsFromPython, callback_checks.check_random_state_is_unchanged, RANDOM, "random"),
    (UnsafeState, callback_checks.check_state_round_trips, "The state survives a checkpoint", "weights_only=True"),
    (LosesState, callback_checks.check_state_round_trips, "The state survives a checkpoint", "steps: 0, not 21"),
    (ForgetsState, callback_checks.check_resume_is_exact, "A resumed run equals the uninterrupted one", "weights"),
    (
        ReadsTooEarly,
        callback_checks.check_order_does_not_matter,
        "The order of callbacks does not matter",
        "No callback of this Trainer writes `losses`",
    ),
    (
        ReadsInTheWritersHook,
        callback_checks.check_order_does_not_matter,
        "The order of callbacks does not matter",
        r"listed first, .*state_dict\(\)",
    ),
    (
        RequiresTooLate,
        callback_checks.check_missing_callbacks_are_named,
        "A missing callback is named before the first step",
        "1 steps were begun",
    ),
    (
        NamesNothing,
        callback_checks.check_missing_callbacks_are_named,
        "A missing callback is named before the first step",
        "something is missing",
    ),
    (HoldsLambda, callback_checks.check_is_picklable, "It can be pickled before a fit", "lambda"),
    (
        TrustsLogger,
        callback_checks.check_logger_failures_are_survived,
        "A logger that fails does not end the training",
        "OSError: this logger has no log_metrics today",
    ),
]


@pytest.mark.parametrize(("kind", "check", "rule", "found"), BROKEN, ids=lambda one: getattr(one, "__name__", ""))
def test_a_callback_that_breaks_a_rule_is_named_with_it(kind, check, rule, found):
    with pytest.raises(
        AssertionError, match=rf"{re.escape(rule)}: {kind.__name__} breaks this rule\.\nFound: .*{found}"
    ):
        check(kind)


def test_a_callback_that_keeps_every_rule_passes():
    check_callback(Harmless)


def test_a_mitigation_that_acts_always_is_not_compared_with_a_plain_run():
    class Scales(ForgetsState):
        """By the step, which Lightning saves."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            next(pl_module.parameters()).grad.mul_(1 / (1 + trainer.global_step))

    with pytest.raises(AssertionError, match="An idle mitigation"):
        check_mitigation(Scales)
    with pytest.raises(AssertionError, match="It can be pickled before a fit"):  # a class within a function
        check_mitigation(Scales, always_acts=True)


# Localizers -----------------------------------------------------------------------------------------------------------


def right(task):
    return METHODS["activation x gradient"](task)


def forgets_a_layer(task):
    return dict(list(right(task).items())[1:])


def divides_by_zero(task):
    return {name: own / 0 for name, own in right(task).items()}


def draws(task):
    return {name: own + torch.rand(1) for name, own in right(task).items()}


def leaves_gradients(task):
    task.loss(task.targets[0].batch).backward()
    return right(task)


def leaves_a_hook(task):
    task.model.register_forward_hook(lambda *_: None)
    return right(task)


def leaves_evaluation_mode(task):
    task.model.eval()
    return right(task)


def guesses_the_opposite(task):
    return {name: -own for name, own in right(task).items()}


@pytest.mark.parametrize(
    ("localizer", "check", "rule", "found"),
    [
        (forgets_a_layer, localizer_checks.check_every_layer_is_scored, "Every hidden layer is scored", "shapes"),
        (divides_by_zero, localizer_checks.check_every_layer_is_scored, "Every hidden layer is scored", "not finite"),
        (draws, localizer_checks.check_scores_are_deterministic, "Scores are deterministic", "differs at"),
        (draws, localizer_checks.check_model_is_unchanged, "The model is left as it was", "random state"),
        (leaves_gradients, localizer_checks.check_model_is_unchanged, "The model is left as it was", "gradients"),
        (leaves_a_hook, localizer_checks.check_model_is_unchanged, "The model is left as it was", "_forward_hooks"),
        (
            leaves_evaluation_mode,
            localizer_checks.check_model_is_unchanged,
            "The model is left as it was",
            "in evaluation mode",
        ),
        (guesses_the_opposite, localizer_checks.check_injected_units_are_found, "Injected units are found", "chance"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_localizer_that_breaks_a_rule_is_named_with_it(localizer, check, rule, found):
    with pytest.raises(AssertionError, match=rf"(?s){rule}: {localizer.__name__} breaks this rule\.\nFound: .*{found}"):
        check(localizer)


def test_a_localizer_that_keeps_every_rule_passes():
    check_localizer(right)


def test_a_baseline_need_not_find_units():
    check_localizer(METHODS["random"], baseline=True)
    with pytest.raises(AssertionError, match="Injected units are found: random_scores breaks this rule"):
        check_localizer(METHODS["random"])
