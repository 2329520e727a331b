"""This package's own callbacks and localizers keep the rules that `lightning_memsink.testing` checks."""

import pytest
from lightning.pytorch import Callback

import lightning_memsink
from lightning_memsink import ExtractionProbe, LossTracker, LossTruncation, RunReport, SinkLocalizer
from lightning_memsink.callbacks.runtime.mitigation import Mitigation
from lightning_memsink.localization.localizers import METHODS
from lightning_memsink.testing import callback_checks, localizer_checks
from lightning_memsink.testing.small_run import CONTROLS, REPEATED

KINDS = [
    kind
    for kind in (getattr(lightning_memsink, name) for name in lightning_memsink.__all__)
    if isinstance(kind, type) and issubclass(kind, Callback)
]
FACTORIES = {kind.__name__: kind for kind in KINDS} | {
    "LossTracker": lambda: LossTracker(identity="content"),
    "ExtractionProbe": lambda: ExtractionProbe({"repeated": REPEATED, "controls": CONTROLS[:4]}, prefix=4, n=10),
    "RunReport": lambda: RunReport(path=None),
    "SinkLocalizer": lambda: SinkLocalizer(every=1, fraction=0.1),
    "LossTruncation": lambda: LossTruncation(0.1, window=16),
}
MITIGATIONS = {kind.__name__ for kind in KINDS if issubclass(kind, Mitigation)}
ALWAYS_ACT = {"Goldfish", "LossTruncation", "MemSinks"}
BASELINES = {"random", "weight norm"}


@pytest.mark.parametrize("check", callback_checks.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", FACTORIES)
def test_a_callback_keeps_the_rule(name, check):
    check(FACTORIES[name])


@pytest.mark.parametrize("name", [name for name in FACTORIES if name not in MITIGATIONS])
def test_a_callback_that_watches_changes_no_weight(name):
    callback_checks.check_weights_are_unchanged(FACTORIES[name])


@pytest.mark.parametrize("name", sorted(MITIGATIONS - ALWAYS_ACT))
def test_a_mitigation_changes_no_weight_while_it_is_idle(name):
    callback_checks.check_idle_mitigation_changes_no_weight(FACTORIES[name])


def test_every_mitigation_is_among_the_public_names():
    assert MITIGATIONS >= ALWAYS_ACT and len(MITIGATIONS) >= 6


@pytest.mark.parametrize("check", localizer_checks.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("method", METHODS)
def test_a_localizer_keeps_the_rule(method, check):
    check(METHODS[method])


@pytest.mark.parametrize("method", [method for method in METHODS if method not in BASELINES])
def test_a_localizer_finds_injected_units(method):
    localizer_checks.check_injected_units_are_found(METHODS[method])
