"""Files and module paths of earlier versions are read as those versions read them. ``make.py`` made the files."""

import json
import lzma
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_memsink import Ledger, Sinks, _moved
from lightning_memsink.cli import main
from lightning_memsink.cli.audit import _parser, _resolved
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.parquet import detect, read_ledger
from tests.formats.frozen_run import EPOCHS, RUNS, SmallLM, facts, fit, plain

OLD = Path(__file__).parent / "f36e55b"
RECIPES = sorted(path.name for path in (OLD / "recipes").glob("*.yaml"))


def read(name):
    return json.loads((OLD / name).read_text())


def same(found, expected):
    """Equal as JSON, where NaN equals NaN."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def changed(found, saved, where=""):
    """Where a saved state has a value that was read otherwise; keys that later versions add don't count."""
    if isinstance(saved, dict) and isinstance(found, dict):
        return [place for key in saved for place in changed(found.get(key, "missing"), saved[key], f"{where}/{key}")]
    if (
        isinstance(saved, list)
        and isinstance(found, list)
        and len(saved) == len(found)
        and all(isinstance(each, dict) for each in saved)
    ):
        return [
            place for n, pair in enumerate(zip(found, saved, strict=True)) for place in changed(*pair, f"{where}/{n}")
        ]
    return [] if same(found, saved) else [where]


def kept(places):
    """Without the losses of controls at earlier evaluations, which nothing reads any more."""
    return [place for place in places if not place.endswith(("/snapshots", "/snapshot_steps"))]


class AtTheStart(Callback):
    """Keeps what the ledger and the callbacks hold before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.facts = facts(Ledger.of(trainer))
        self.states = {callback.state_key: plain(callback.state_dict()) for callback in trainer.callbacks}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_an_old_checkpoint_with_its_ledger(name, tmp_path):
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.write_bytes(lzma.decompress((OLD / f"{name}.ckpt.xz").read_bytes()))
    model, start = SmallLM(), AtTheStart()
    callbacks = RUNS[name](model)
    trainer = fit([*callbacks, start], model, EPOCHS + 1, checkpoint)
    expected = read(f"{name}.json")
    assert same(start.facts, expected)
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert kept(changed(start.states, plain(saved))) == []
    now, per_epoch = facts(Ledger.of(trainer))["samples"], {EPOCHS: 1, 12 * EPOCHS: 12}
    before = expected["samples"]
    assert now["ids"] == before["ids"] and now["first_loss"] == before["first_loss"]
    assert now["exposures"] == [exposures + per_epoch[exposures] for exposures in before["exposures"]]
    assert trainer.global_step == 13 * (EPOCHS + 1)


def test_old_sinks_load():
    sinks = Sinks.load(OLD / "sinks.safetensors")
    assert same(plain({"units": dict(sinks.units), "scores": dict(sinks.scores)}), read("watching.json")["sinks"])
    assert sinks.sizes == {"mlp.2": 32}


def test_an_old_ledger_on_disk_is_read_and_evaluated_as_before():
    expected = read("ledger.json")
    table, controls = read_ledger(OLD / "ledger")
    assert changed(plain(table.state_dict()), expected["table"]) == []
    assert kept(changed(plain(controls.state_dict()), expected["controls"])) == []
    flags, evaluation = detect(OLD / "ledger")
    assert evaluation.memorized == expected["memorized"] > 0
    found, then = (
        torch.tensor(codes) == Verdict.MEMORIZED for codes in (flags.verdict.tolist(), expected["flags"]["verdict"])
    )
    assert torch.equal(found, then)


def test_an_old_report_beside_itself_is_compared(tmp_path):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "report.json").write_bytes((OLD / "report.json").read_bytes())
        (tmp_path / run / "report.html").touch()
    assert main(["report", str(tmp_path / "one"), "--against", str(tmp_path / "two")]) == 0
    assert "8 of 16 samples memorized" in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("audit_smollm2")])
def test_a_copied_recipe_is_valid(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memsink"])
    overlay = recipe in ("audit_keep_demo.yaml", "mitigate_hold.yaml")
    configs = [OLD / "recipes" / name for name in (["watch.yaml", recipe] if overlay else [recipe])]
    assert main(["validate", *(word for path in configs for word in ("-c", str(path)))]) == 0
    assert capsys.readouterr().out.startswith("OK: would fit")


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_copied_recipe_of_an_audit_is_valid_with_options_of_then():
    words = ["--config", str(OLD / "recipes" / "audit_smollm2.yaml"), "--ask.closer=7"]
    options = _parser().parse_args(_resolved(words))
    assert (options.probe.prefix, options.probe.length, options.probe.units, options.probe.closer) == (24, 96, True, 7)
    assert (options.suspects, options.out) == ("smollm2/suspects.jsonl", "smollm2/audit")


# Module paths ---------------------------------------------------------------------------------------------------------


WITHOUT_SUCCESSOR = {"integrations.wandb.how_to_open", "integrations.wandb.keep_files"}
"""Helpers that nothing documented: what they did is in `lightning_memsink.reporting.loggers.logged_run`."""


@pytest.mark.parametrize("module", read("names.json"))
def test_every_name_of_a_documented_old_module_resolves_with_a_warning(module):
    old = import_module(f"lightning_memsink.{module}")
    for name in read("names.json")[module]:
        if f"{module}.{name}" in WITHOUT_SUCCESSOR:
            continue
        with pytest.warns(DeprecationWarning, match=rf"lightning_memsink\.{module}\.{name} is now lightning_memsink\."):
            assert getattr(old, name) is not None


def test_an_old_name_is_the_same_object_as_the_new_one():
    from lightning_memsink.examples.text import CausalLM
    from lightning_memsink.extraction.functional import exact_match
    from lightning_memsink.localization.evaluation import evaluate_ownership

    with pytest.warns(DeprecationWarning):
        from lightning_memsink.demo import CausalLM as old_model
        from lightning_memsink.judging_localizers.blind import judge_blind as renamed

        from lightning_memsink.extraction import exact_match as old_function
    assert (old_model, old_function, renamed) == (CausalLM, exact_match, evaluate_ownership)


def test_the_warning_names_the_line_of_the_caller():
    with pytest.warns(DeprecationWarning) as caught:
        from lightning_memsink.parquet import detect as old

        assert old is detect
    assert {warning.filename for warning in caught} == {__file__}


def test_a_name_that_never_existed_raises_the_usual_error():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'lightning_memsink\.demos'"):
        import_module("lightning_memsink.demos")
    with pytest.raises(AttributeError, match=r"'lightning_memsink\.parquet' has no attribute 'nonsense'"):
        _ = import_module("lightning_memsink.parquet").nonsense
    with pytest.raises(ImportError, match="nonsense"):
        exec("from lightning_memsink.extraction import nonsense")


def test_an_old_module_runs_as_a_program():
    """As the copied recipe of an audit says: python -m lightning_memsink.data.famous FOLDER."""
    words = [sys.executable, "-m", "lightning_memsink.data.famous"]
    assert "One folder is needed" in subprocess.run(words, capture_output=True, text=True).stderr


def test_no_module_of_today_has_an_old_path():
    package = Path(_moved.__file__).parent
    for old in _moved.MODULES:
        path = package.joinpath(*old.split("."))
        assert not path.is_dir() and not path.with_suffix(".py").exists()
