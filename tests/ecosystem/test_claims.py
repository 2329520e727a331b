"""When a run of the compatibility suite is as claimed, and when it is not."""

from dataclasses import replace

import pytest

from tests.ecosystem.claims import CLAIMS, Claim, Finding, differences, losses_found
from tests.ecosystem.environments import ROOT, error_line
from tests.ecosystem.versions import CORE, oldest

READ = Claim("package==1", "shared", "module", "Model")
NOT_READ = replace(READ, message="Model.training_step has a loss that comes from")
GOOD = Finding({}, 20, 10, 20, 5, 10, True, True, [], 1e-7, 1e-7, 1e-7)
SAID = (2, "Model.training_step has a loss that comes from ExpBackward0, which tells no per-sample losses.")
VALIDATED_OTHERWISE = (5, "Model.validation_step calls cross_entropy, where training_step was seen to use add.")
SILENT = replace(GOOD, tracked=0, controls=0, error=None, control_error=None, messages=[SAID])


@pytest.mark.parametrize(
    ("claim", "found", "differs"),
    [
        (READ, GOOD, []),
        (READ, replace(GOOD, control_error=None), []),
        (READ, replace(GOOD, identical=False), ["weights differ"]),
        (READ, replace(GOOD, reproducible=False), ["not reproducible without us"]),
        (READ, replace(GOOD, tracked=9), ["some samples have no loss"]),
        (READ, replace(GOOD, error=1e-2), ["losses are not those of samples alone"]),
        (READ, replace(GOOD, error=None), ["losses are not those of samples alone"]),
        (READ, replace(GOOD, control_error=1.0), ["losses of controls are not those of samples alone"]),
        (READ, replace(GOOD, messages=[SAID]), ["a message about training_step"]),
        (READ, replace(GOOD, controls=0, control_error=None), ["no controls, and nothing says why"]),
        (READ, replace(GOOD, controls=0, control_error=None, messages=[VALIDATED_OTHERWISE]), []),
        (NOT_READ, SILENT, []),
        (NOT_READ, replace(SILENT, messages=[SAID, SAID]), ["a message was repeated"]),
        (NOT_READ, replace(SILENT, messages=[(9, SAID[1])]), ["not said at the start: " + NOT_READ.message]),
        (NOT_READ, replace(SILENT, tracked=3), ["losses of some samples were tracked"]),
    ],
)
def test_differences_between_claim_and_finding_are_listed(claim, found, differs):
    assert differences(claim, found) == differs


def test_the_table_shows_the_error_against_losses_of_samples_alone():
    assert losses_found(GOOD) == "10 of 10 samples, within 1e-07; 5 controls, 1e-07"
    assert losses_found(SILENT) == "none, said once at the start"


def test_every_case_has_a_file_and_a_pinned_package():
    for claim in CLAIMS.values():
        assert (ROOT / "tests" / "ecosystem" / "modules" / f"{claim.module}.py").exists() and "==" in claim.package


def test_the_oldest_releases_are_the_lower_bounds():
    floors = oldest()
    assert any(one.startswith("lightning==2.6") for one in floors) and "jsonargparse[signatures]==4.40" in floors
    assert not any(one.startswith("torch==") for one in floors)
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in CORE)


def test_the_error_of_pip_is_found_among_its_warnings():
    assert error_line("WARNING: a\nERROR: no such version\nhint: b\nWARNING: c") == "ERROR: no such version"
    assert error_line("") == "no words at all"
