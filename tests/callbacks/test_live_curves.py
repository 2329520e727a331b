"""Curves and the report in real Trainer runs, over a ledger made up by a callback of the test."""

import csv
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_memsink.callbacks import live_curves, run_report
from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.progress import MemSinkProgressBar
from lightning_memsink.callbacks.run_report import RunReport
from lightning_memsink.ledger import Ledger
from tests.support.made_up import RUNGS
from tests.support.reported_runs import QUIET, Writer, fit

pytestmark = QUIET


class Broken(Logger):
    """Raises the error ``sorry`` whenever it gets numbers."""

    def __init__(self, sorry: Exception) -> None:
        super().__init__()
        self.sorry, self.tried = sorry, 0

    name = version = "broken"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if "memsink/gap" in metrics:
            self.tried += 1
            raise self.sorry


def test_every_evaluation_is_a_row_of_the_history():
    curves = LiveCurves()
    trainer = fit([curves, Writer()])
    assert [row["step"] for row in curves.history] == [2, 4, 6]
    assert Ledger.of(trainer).history is curves.history
    assert "loss/natural/x2" in curves.history[0], "the data module's rungs"


@pytest.mark.parametrize("first", [LiveCurves, Writer])
def test_evaluations_between_validations_and_at_the_end_are_shown_in_any_order(first):
    """Written in on_train_batch_start and on_train_end, they come out the same wherever LiveCurves is listed."""
    curves, writer = LiveCurves(), Writer(also_at=(3, 7))
    fit([curves, writer] if first is LiveCurves else [writer, curves], steps=7)
    assert [row["step"] for row in curves.history] == [2, 3, 4, 6, 7]


def test_rungs_given_win_over_the_data_module_and_unknown_ids_are_warned_of():
    rung = RUNGS[0]
    strangers = type(rung)("strange x8", 8, torch.tensor([777]), rung.twin_ids)
    with pytest.warns(UserWarning, match="identity='content'"):
        curves = LiveCurves(rungs=[strangers])
        fit([curves, Writer()])
    assert "loss/strange/twins" in curves.history[0] and "loss/natural/x2" not in curves.history[0]


def test_without_a_detector_the_first_step_is_refused():
    with pytest.raises(RuntimeError, match=r"Add LossTracker\(\)"):
        fit([LiveCurves()])


def test_csv_and_tensorboard_get_every_scalar(tmp_path):
    curves = LiveCurves()
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board")]
    fit([curves, Writer()], loggers)
    with open(Path(loggers[0].log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["memsink/gap"]]
    for row, logged in zip(rows, curves.history, strict=True):
        assert {name: float(row[f"memsink/{name}"]) for name in logged if name != "step"} == {
            name: value for name, value in logged.items() if name != "step"
        }
        assert int(row["step"]) == logged["step"]
    board = scalars_of(loggers[1].log_dir)
    for name in set(curves.history[-1]) - {"step"}:
        expected = [(row["step"], pytest.approx(row[name])) for row in curves.history if name in row]
        assert board[f"memsink/{name}"] == expected


def scalars_of(directory: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(directory)
    board.Reload()
    return {tag: [(one.step, one.value) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.parametrize("sorry", [RuntimeError("no server"), OSError(28, "No space left on device")], ids=str)
def test_a_logger_that_raises_is_named_once_and_training_goes_on(sorry, tmp_path):
    broken, curves = Broken(sorry), LiveCurves()
    with pytest.warns(UserWarning) as warned:
        trainer = fit([curves, Writer()], [broken, CSVLogger(tmp_path)])
    [warning] = [str(one.message) for one in warned if "Broken" in str(one.message)]
    assert str(sorry) in warning
    assert (trainer.global_step, broken.tried, len(curves.history)) == (6, 3, 3)
    assert (Path(tmp_path) / "lightning_logs" / "version_0" / "metrics.csv").exists(), "the others still get theirs"


def test_other_ranks_log_nothing(monkeypatch):
    broken = Broken(AssertionError("logged"))
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    fit([LiveCurves(), Writer(), RunReport("never.md")], [broken])
    assert broken.tried == 0 and not Path("never.md").exists()


def test_the_history_survives_a_checkpoint(tmp_path):
    path = tmp_path / "middle.ckpt"
    fit([LiveCurves(), Writer()], steps=4).save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["LiveCurves"]
    assert [row["step"] for row in state["history"]] == [2, 4]
    curves = LiveCurves()
    trainer = fit([curves, Writer()], ckpt_path=path, steps=6)
    assert [row["step"] for row in curves.history] == [2, 4, 6]
    assert Ledger.of(trainer).history is curves.history


def test_more_rows_than_a_log_should_hold_are_refused():
    with pytest.raises(ValueError, match="0 to 1000, but it is 1001"):
        LiveCurves(top=1001)


# The report -----------------------------------------------------------------------------------------------------------


def test_the_report_is_written_and_printed_with_the_last_evaluation(tmp_path, capsys):
    fit([RunReport(tmp_path / "report.md"), LiveCurves(), Writer(also_at=(7,))], steps=7)
    text, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert "set in at step 40" in text and "natural x4 (75 %)" in text
    assert "set in at step 40" in printed and "report.md" in printed
    assert len([file for file in (tmp_path / "report_files").iterdir() if file.suffix in (".png", ".svg")]) == 8
    assert sorted(file.name for file in (tmp_path / "report_files/ledger").iterdir()) == [
        "controls.parquet",
        "samples.parquet",
    ]


def test_a_report_without_path_is_only_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit([RunReport(None), LiveCurves(), Writer()])
    assert "How sure" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_failed_training_writes_no_report(tmp_path):
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit([RunReport(tmp_path / "report.md"), LiveCurves(), Writer(), Fails()], steps=64, limit_train_batches=4)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_the_report_and_nothing_else(tmp_path, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="No space left"):
        fit([RunReport(tmp_path / "report.md"), LiveCurves(), Writer()])
    assert not list(tmp_path.glob("report.md*")), "nothing half written"
    assert "set in at step 40" in capsys.readouterr().out


def test_without_matplotlib_the_report_has_words_only(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightning_memsink.reporting.figures", None)
    with pytest.warns(UserWarning, match=r"lightning-memsink\[report\]"):
        fit([RunReport(tmp_path / "report.md"), LiveCurves(), Writer()])
    assert "![" not in (tmp_path / "report.md").read_text()


def test_the_bar_shows_the_memorized_samples():
    bar = MemSinkProgressBar()
    fit([bar, Writer(), LiveCurves()], enable_progress_bar=True)
    assert bar.configure_columns(bar.trainer)[-1].text() == "memorized 3 · gap 0.12 nats"


def test_nothing_heavy_is_imported_with_the_callbacks():
    for module in (live_curves, run_report):
        assert not {"wandb", "matplotlib", "transformers"} & set(vars(module))


def test_the_command_line_takes_them():
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    homes = ("live_curves.LiveCurves", "run_report.RunReport", "progress.MemSinkProgressBar")
    paths = [f"--callbacks+=lightning_memsink.callbacks.{home}" for home in homes]
    parsed = parser.parse_args([paths[0], "--callbacks.top=5", paths[1], "--callbacks.path=null", paths[2]])
    curves, report, _ = parser.instantiate(parsed).callbacks
    assert (curves.top, report.path) == (5, None)
