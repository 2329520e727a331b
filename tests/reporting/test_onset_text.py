"""What is said of an onset, and when a logger alerts of it."""

from dataclasses import replace
from unittest.mock import MagicMock

import pytest

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.detection.onset import RunOnset
from lightning_memsink.reporting.loggers.logged_run import LoggedEnd
from lightning_memsink.reporting.loggers.wandb_run import WandbRun
from lightning_memsink.reporting.onset_text import onset_alert, onset_basis, onset_title
from tests.support.made_up import ONSET, made_up

SETTLED = RunOnset(1040, 20, 1060, 4.0, 3.0, 6.0, 31, 4, True)


def test_the_number_of_samples_behind_it_is_said():
    assert onset_title(SETTLED) == "Memorization set in at step 1,040"
    assert onset_basis(SETTLED) == "This is when the first 4 of 31 memorized samples had been flagged."
    assert onset_basis(replace(SETTLED, samples=1, reached=1, settled=False)) == (
        "This is when the first of 1 memorized sample had been flagged. No second evaluation has confirmed it yet."
    )
    assert "interval 20 to 1,060), at exposure 4 of a sample. This is when" in onset_alert(SETTLED)
    assert "the first of 3 memorized samples" in onset_basis(ONSET), "an older version kept no more"


def test_an_onset_is_news_once_it_is_settled_and_again_if_it_moves():
    curves = LiveCurves()
    assert curves._news(None) is None and curves._news(replace(SETTLED, settled=False)) is None
    assert curves._news(SETTLED) is SETTLED and curves._news(SETTLED) is None
    moved = replace(SETTLED, step=1200)
    resumed = LiveCurves()
    resumed.load_state_dict(curves.state_dict())
    assert resumed._news(SETTLED) is None and resumed._news(moved) is moved


def test_a_checkpoint_of_an_older_version_has_announced_what_it_knows():
    resumed = LiveCurves()
    resumed.load_state_dict({"history": [], "announced": True})
    assert resumed._news(SETTLED) is None
    assert resumed._news(replace(SETTLED, step=9)) is not None, "but what moves is news"


@pytest.mark.parametrize("is_news", [True, False])
def test_the_end_alerts_of_what_no_evaluation_has(is_news):
    run = MagicMock()
    logged = WandbRun(MagicMock(experiment=run))
    logged.end(LoggedEnd(made_up().row([]), replace(SETTLED, settled=False), None, None, is_news=is_news))
    assert run.alert.call_count == is_news
    assert run.summary.update.call_args.args[0]["memsink/final/onset_step"] == 1040
