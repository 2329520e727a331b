"""Rules that every callback of lightning_memsink keeps, as checks of any callback. Each raises AssertionError."""

from __future__ import annotations

import copy
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

import lightning_memsink
from lightning_memsink.testing.callback_runs import (
    Factory,
    facts_of,
    left_after,
    left_without,
    plain_run,
    reference_run,
    run,
    short,
)
from lightning_memsink.testing.failures import failure
from lightning_memsink.testing.small_run import NEVER_REPEATED, SmallLM, companions, difference, fit, quiet
from lightning_memsink.testing.traces import FailingLogger


def check_hooks_are_removed(factory: Factory) -> None:
    """Module, parameters, optimizer, loader and strategy are without hooks after success, an exception and Ctrl-C."""
    rule = "Hooks are removed however training ends"
    for end in (None, RuntimeError, KeyboardInterrupt):
        added = left_after([*companions(factory()), factory()], end) - left_without(end)
        if added:
            raise failure(
                rule,
                _name(factory),
                f"after {'success' if end is None else end.__name__}, {', '.join(sorted(added))}",
                "what the same run leaves without the callback",
                "Remove hooks, and attributes set on other objects, in `teardown` and in `on_exception`: Lightning "
                "calls `teardown` only after success.",
            )


def check_weights_are_unchanged(factory: Factory) -> None:
    """A callback that only watches leaves every weight as it would be without it, to the bit."""
    _compare_weights(
        "Watching changes no weight",
        factory,
        reference_run(factory)["weights"],
        plain_run(repeated=True)["weights"],
        "Detach what is read, and leave gradients, the loss and the model's mode alone. A mitigation is checked with "
        "check_mitigation.",
    )


def check_idle_mitigation_changes_no_weight(factory: Factory) -> None:
    """A mitigation leaves every weight to the bit while no sample is repeated, flagged or below its controls."""
    with quiet():
        _, module, _ = run("Training runs with the callback", factory, tokens=NEVER_REPEATED, epochs=1)
    _compare_weights(
        "An idle mitigation changes no weight",
        factory,
        module.state_dict(),
        plain_run(repeated=False)["weights"],
        "Do nothing, not even a multiplication with one, unless a sample of the batch is to be acted on. For a "
        "mitigation that acts on every sample: check_mitigation(factory, always_acts=True).",
    )


def check_random_state_is_unchanged(factory: Factory) -> None:
    """The global random generators of torch, NumPy and Python are after training as without the callback."""
    found = difference(reference_run(factory)["random state"], plain_run(repeated=True)["random state"])
    if found is not None:
        raise failure(
            "Global random generators are left alone",
            _name(factory),
            found,
            "the state after the same run without the callback",
            "Draw from a generator of your own: torch.Generator().manual_seed(...).",
        )


def check_state_round_trips(factory: Factory) -> None:
    """``state_dict()`` holds tensors and plain types, and ``load_state_dict`` restores all of it."""
    rule, saved = "The state survives a checkpoint", reference_run(factory)["state"]
    file = io.BytesIO()
    try:
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    except Exception as error:
        raise failure(
            rule,
            _name(factory),
            f"torch.load(weights_only=True) of its state_dict() raised {short(error)}",
            "tensors, numbers, strings, lists and dicts only",
            "Convert other values in `state_dict`: Lightning loads checkpoints with weights_only=True.",
        ) from error
    fresh = factory()
    if saved:
        fresh.load_state_dict(copy.deepcopy(loaded))
    lost = difference(fresh.state_dict(), saved)
    if lost is not None:
        raise failure(
            rule,
            _name(factory),
            f"after load_state_dict, state_dict() differs at {lost}",
            "the state that was loaded",
            "Restore in `load_state_dict` every entry of `state_dict`.",
        )


def check_resume_is_exact(factory: Factory) -> None:
    """A run resumed from a checkpoint between epochs ends as the uninterrupted one."""
    reference = reference_run(factory)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.ckpt"
        checkpoint.write_bytes(reference["checkpoint"])
        found = difference(facts_of("A resumed run trains", factory, checkpoint=checkpoint), reference["facts"])
    if found is not None:
        raise failure(
            "A resumed run equals the uninterrupted one",
            _name(factory),
            f"they differ at {found}",
            "the same weights, ledger and state, to the bit",
            "Save in `state_dict` everything that later steps depend on, counters and random generators included.",
        )


def check_order_does_not_matter(factory: Factory) -> None:
    """At any place in the list of callbacks, ledger, weights and the callback's own state are the same."""
    rule = "The order of callbacks does not matter"
    expected = reference_run(factory)["facts"]
    for first, backwards in ((True, False), (False, True), (True, True)):
        place = f"{'first' if first else 'last'}, the others {'backwards' if backwards else 'in order'}"
        with quiet():
            found = difference(facts_of(rule, factory, first=first, backwards=backwards), expected)
        if found is not None:
            raise failure(
                rule,
                _name(factory),
                f"listed {place}, the run differs at {found}",
                "the run with the callback listed last, the others in order",
                "Read a slot of the ledger in `on_train_start` or later, and in another hook than the one its writer "
                "writes it in (docs/architecture.md), or call `ledger.close(slot)` before.",
            )


def check_missing_callbacks_are_named(factory: Factory) -> None:
    """Without the callbacks it needs, training ends before the first step and the error names which to add."""
    rule = "A missing callback is named before the first step"
    added: list[Callback] = []
    while True:
        module = SmallLM()
        try:
            with quiet():
                fit([factory(), *added], module, epochs=1)
            return
        except Exception as error:
            named = re.search(r"Add (\w+)\(\)", str(error)) if isinstance(error, RuntimeError) else None
            if named is None or module.steps_begun or named[1] in {type(each).__name__ for each in added}:
                raise failure(
                    rule,
                    _name(factory),
                    f"with {', '.join(type(each).__name__ for each in added) or 'no other callback'}, "
                    f"{module.steps_begun} steps were begun and then {short(error)}",
                    "a RuntimeError before the first step, with `Add NAME()` for a callback that is not there yet",
                    "Call `Ledger.of(trainer).require(Ledger.x)` in `on_train_start` for each slot that is read.",
                ) from error
            known = {type(each).__name__: each for each in companions()}
            added.append(known[named[1]] if named[1] in known else getattr(lightning_memsink, named[1])())


def _through_a_process(callback: Callback) -> Callback:
    """What a launcher of processes does with a callback: its own bytes of this moment, never a file."""
    received: Callback = ForkingPickler.loads(bytes(ForkingPickler.dumps(callback)))
    return received


def check_is_picklable(factory: Factory) -> None:
    """Before a fit it can be pickled and copied, as launchers of processes and searches over settings do."""
    clones: Sequence[Callable[[Callback], Callback]] = (_through_a_process, copy.deepcopy)
    for clone in clones:
        try:
            found = type(clone(factory()))
        except Exception as error:
            raise failure(
                "It can be pickled before a fit",
                _name(factory),
                short(error),
                "a copy of the same class",
                "Keep lambdas, open files and handles out of `__init__`: make them in `setup`.",
            ) from error
        assert found is type(factory()), f"A copy of {_name(factory)} is a {found.__name__}."


def check_logger_failures_are_survived(factory: Factory) -> None:
    """A logger that raises at every call does not end the training."""
    rule = "A logger that fails does not end the training"
    with quiet():
        run(rule, factory, logger=FailingLogger())


CHECKS: Sequence[Callable[[Factory], None]] = (
    check_is_picklable,
    check_missing_callbacks_are_named,
    check_hooks_are_removed,
    check_random_state_is_unchanged,
    check_state_round_trips,
    check_resume_is_exact,
    check_order_does_not_matter,
    check_logger_failures_are_survived,
)
"""Those of every callback; beside them one on weights."""


def _name(factory: Factory) -> str:
    return type(factory()).__name__


def _compare_weights(rule: str, factory: Factory, found: Any, expected: Any, remedy: str) -> None:
    changed = difference(found, expected)
    if changed is not None:
        raise failure(rule, _name(factory), changed, "the weights of the same run without the callback", remedy)
