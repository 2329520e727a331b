"""What an offline W&B run holds, read back with W&B's own reader; and that W&B never stops a training."""

import os
import socket
from unittest.mock import MagicMock

import numpy
import pytest
import torch
import wandb

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.run_report import RunReport
from lightning_memsink.detection.verdicts import WORDS
from lightning_memsink.reporting.loggers.logged_run import LoggedEvaluation
from lightning_memsink.reporting.loggers.wandb import SafeWandbLogger, offline_without_key
from lightning_memsink.reporting.loggers.wandb_run import WandbRun
from lightning_memsink.reporting.scalars import top_memorized
from tests.support.made_up import ONSET, SAMPLES, made_up
from tests.support.reported_runs import QUIET, Writer, fit
from tests.support.wandb_reader import RecordedRun, read_run

KEY = "0" * 40
pytestmark = [QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def no_user(tmp_path, monkeypatch):
    """A user without key, settings or home."""
    for name in ["WANDB_MODE", "NETRC", *(name for name in os.environ if name.startswith("WANDB"))]:
        monkeypatch.setenv(name, "")  # so that a test's own value goes with the test
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(home))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[RecordedRun, LiveCurves, Writer, str]:
    """One offline run with everything in it."""
    where = tmp_path_factory.mktemp("recorded")
    curves, writer = LiveCurves(text=lambda id: f"text of {id}"), Writer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(where))
        patch.delenv("WANDB_MODE", raising=False)
        wandb.teardown()  # what a test before may have left open would take these rows
        fit([curves, writer, RunReport(where / "report.md")], SafeWandbLogger(offline=True, save_dir=where))
        wandb.finish()
        wandb.teardown()
    return read_run(where), curves, writer, (where / "report.md").read_text()


def test_every_series_is_in_the_run_with_the_values_of_the_history(recorded):
    run, curves, *_ = recorded
    names = set().union(*curves.history) - {"step"}
    promised = {"gap", "null_low", "null_high", "threshold", "gap_memorized", "flagged_fraction", "control_loss"}
    promised |= {"train_loss", "p_floor", "onset_step", "onset_step_low", "onset_exposures"}
    promised |= {f"verdict/{word}" for word in WORDS} | {f"loss/natural/{rung}" for rung in ("x2", "x4", "twins")}
    assert promised <= names
    for name in names:
        logged = [(row["step"], pytest.approx(row[name])) for row in curves.history if name in row]
        assert run.series(f"memsink/{name}") == logged


def test_the_axis_is_the_optimizer_step_and_no_row_is_lost(recorded):
    run, curves, *_ = recorded
    axes = {metric.get("glob_name") or metric.get("name"): metric for metric in run.metrics}
    assert axes["memsink/*"]["step_metric"] == "trainer/global_step"
    assert axes["memsink/gap"]["summary"] == {"max": True, "last": True}
    assert run.summary["memsink/gap"]["max"] == pytest.approx(max(row["gap"] for row in curves.history))


def test_the_table_lists_the_memorized_samples_of_each_evaluation(recorded):
    run, _, writer, _ = recorded
    rows = run.table("memsink/memorized_samples")
    assert [row["step"] for row in rows] == [4, 4, 4, 6, 6, 6], "nothing was memorized at the first evaluation"
    for row, sample in zip(rows[3:], top_memorized(writer.made.table, writer.made.flags, 6, 20), strict=True):
        assert (row["id"], row["hash"], row["exposures"]) == (str(sample.id), sample.hash, sample.exposures)
        for name in ("loss", "control_loss", "gap", "bits", "p"):
            assert row[name] == pytest.approx(getattr(sample, name), rel=1e-6)
        assert (row["verdict"], row["onset_step"], row["text"]) == ("memorized", 40, f"text of {sample.id}")


def test_the_histogram_counts_every_measured_gap(recorded):
    run, _, writer, _ = recorded
    last = run.history[-1]
    counts, edges = numpy.histogram(writer.made.flags.gap.float().numpy(), bins=64)
    assert last["memsink/gaps.values"] == counts.tolist() and sum(counts) == SAMPLES
    assert last["memsink/gaps.bins"] == pytest.approx(edges.tolist(), abs=1e-6)


def test_the_onset_is_alerted_once(recorded):
    [alert] = recorded[0].alerts
    assert alert["title"] == "Memorization set in at step 40"
    assert "memorized: 3." in alert["text"] and "20 to 60" in alert["text"] and "exposure 4" in alert["text"]


def test_config_and_summary_say_how_and_what(recorded):
    run, curves, *_ = recorded
    assert run.config["memsink"]["LiveCurves"]["top"] == 20
    assert set(run.config["memsink"]["versions"]) == {"lightning-memsink", "lightning", "torch", "transformers"}
    final = {name.rsplit("/", 1)[1]: value for name, value in run.summary.items() if name.startswith("memsink/final/")}
    assert {word: final[word] for word in WORDS} == {word: curves.history[-1][f"verdict/{word}"] for word in WORDS}
    assert (final["onset_step"], final["onset_exposures"]) == (ONSET.step, ONSET.exposures)


def test_the_report_says_how_to_open_the_run(recorded):
    run, *_, report = recorded
    assert f"wandb leet {run.path}" in report and f"wandb sync {run.path}" in report


def test_without_the_option_no_text_is_in_the_table():
    made, run = made_up(), MagicMock()
    row = made.row([])
    made.flags.gap.fill_(torch.nan)  # nothing measured
    logged = WandbRun(MagicMock(experiment=run))
    logged.start({})
    logged.evaluation(LoggedEvaluation(row, made.table, made.flags, top=1))
    [logged] = run.log.call_args.args
    table = logged["memsink/memorized_samples"]
    assert len(table.data) == 1 and "text" not in table.columns
    assert "step" not in run.log.call_args.kwargs and logged["trainer/global_step"] == 40
    assert "memsink/gaps" not in logged, "no histogram of nothing"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No W&B run at"):
        read_run(tmp_path)


# No key, no network ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """A test fails if it resolves a host name or prompts the user."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"tried {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("getpass.getpass", refuse)


def test_without_a_key_runs_are_offline_and_there_is_no_prompt(no_network):
    assert offline_without_key()
    assert os.environ["WANDB_MODE"] == "offline"
    assert not offline_without_key(), "it is offline already"


def test_that_is_in_time_for_the_first_run(tmp_path, no_network):
    """wandb reads its settings once, so the mode must be set before it reads them."""
    wandb.teardown()
    offline_without_key()
    trainer = fit([LiveCurves(), Writer()], SafeWandbLogger(save_dir=tmp_path))
    assert trainer.logger.experiment.offline
    wandb.finish()
    assert read_run(tmp_path).series("memsink/gap")


@pytest.mark.parametrize("found_in", ["environment", "netrc", "mode", "settings"])
def test_who_has_a_key_or_chose_a_mode_is_left_alone(found_in, tmp_path, no_network, monkeypatch):
    if found_in == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    elif found_in == "netrc":
        (tmp_path / "netrc").write_text(f"machine {host_of_wandb()} login user password {KEY}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    elif found_in == "mode":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
    before = os.environ.get("WANDB_MODE")
    assert not offline_without_key()
    assert os.environ.get("WANDB_MODE") == before


def host_of_wandb() -> str:
    return wandb.Settings().base_url.removeprefix("https://")


@pytest.mark.parametrize("error", [wandb.errors.CommError, wandb.errors.UsageError])
def test_a_run_that_cannot_start_online_is_recorded_offline(error, tmp_path, monkeypatch):
    start = wandb.init

    def unreachable(*args, **kwargs):
        if kwargs.get("mode") != "offline":
            raise error("no way there")
        return start(*args, **kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    with pytest.warns(UserWarning, match="no way there") as warned:
        trainer = fit([LiveCurves(), Writer()], SafeWandbLogger(save_dir=tmp_path))
    assert sum("recorded offline" in str(one.message) for one in warned) == 1
    assert trainer.global_step == 6
    wandb.finish()
    assert [step for step, _ in read_run(tmp_path).series("memsink/gap")] == [2, 4, 6]


def test_a_run_that_breaks_midway_is_named_once(tmp_path, monkeypatch):
    """A full disk under a run that had started well."""

    class FailsToShow(Writer):
        def on_train_start(self, trainer, pl_module):
            def full(*args, **kwargs):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(wandb, "Histogram", full)

    curves = LiveCurves()
    with pytest.warns(UserWarning, match="SafeWandbLogger failed.*No space left") as warned:
        trainer = fit([curves, FailsToShow()], SafeWandbLogger(offline=True, save_dir=tmp_path))
    assert sum("failed to log" in str(one.message) for one in warned) == 1
    assert (trainer.global_step, len(curves.history)) == (6, 3)
    wandb.finish()


def test_a_disabled_run_costs_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    curves = LiveCurves()
    fit([curves, Writer(), RunReport(tmp_path / "report.md")], SafeWandbLogger(save_dir=tmp_path))
    assert len(curves.history) == 3 and "wandb sync" not in (tmp_path / "report.md").read_text()
    wandb.teardown()


def test_hashes_stay_exact(recorded):
    """A browser reads a JSON number as a double, which can't hold 64 bits."""
    rows = recorded[0].table("memsink/memorized_samples")
    assert all(int(row["hash"], 16) == int(row["id"]) % 2**64 for row in rows)
    assert torch.tensor([int(row["id"]) for row in rows]).dtype == torch.int64


def test_the_report_goes_with_the_run_as_an_artifact(recorded):
    run, *_ = recorded
    artifacts = [record for record in run.artifacts if record["type"] == "memsink-report"]
    assert len(artifacts) == 1
    paths = {entry["path"] for entry in artifacts[0]["manifest"]["contents"]}
    assert {"report.md", "report.html", "report.json", "report_files/gap_distribution.svg"} <= paths
    assert any(path.startswith("report_files/ledger") for path in paths)
