"""The command line: what it finds, what it starts, and how it says what is wrong."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.progress import MemSinkProgressBar
from lightning_memsink.callbacks.run_report import RunReport
from lightning_memsink.cli import main, recipes
from lightning_memsink.cli.fit import MemSinkCLI, with_recipes

# LightningCLI 2.6 calls what jsonargparse 4.53 deprecates
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
readable = pytest.mark.skipif(
    tuple(map(int, version("jsonargparse").split(".")[:2])) < (4, 51),
    reason="older jsonargparse names neither place nor type; its own message is shown",
)
OURS = [LossTracker, MemorizationDetector, LiveCurves, RunReport]
CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 1
  logger: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelSummary
      init_args: {max_depth: 2}
model:
  class_path: lightning.pytorch.demos.boring_classes.BoringModel
data:
  class_path: lightning_memsink.examples.digits.Digits
  init_args: {batch_size: 8}
"""


class Mitigation(Callback):
    """One that a user wrote."""

    def __init__(self, strength: float = 0.5) -> None:
        self.strength = strength


class Built(MemSinkCLI):
    """Everything is built, nothing is run."""

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder but for config.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["memsink"])
    Path("config.yaml").write_text(CONFIG)


def written(name, **content):
    Path(name).write_text(yaml.safe_dump(content))
    return name


def built(*words):
    return Built(args=["fit", "-c", "config.yaml", *words]).trainer.callbacks


def kinds(callbacks):
    return [type(callback) for callback in callbacks if type(callback) in (*OURS, ModelSummary, Mitigation)]


def refusal(*words):
    """What ``memsink validate`` says before it exits with 1."""
    with pytest.raises(SystemExit) as refused:
        main(["validate", *words])
    assert isinstance(refused.value.code, str)  # printed to stderr by Python, with exit code 1
    return refused.value.code


# Recipes ------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_what_they_are_for(capsys):
    main(["recipes", "ls"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.recipe_names()
    assert any(line.startswith("watch ") and "The demo" in line for line in lines)


def test_listing_and_copying_recipes_does_not_load_torch():
    code = (
        "import sys; from lightning_memsink.cli import main; main(['recipes', 'ls']); main(['recipes', 'cp', 'watch']);"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    root = str(recipes._PACKAGE.parent)
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_recipe_is_copied_and_never_overwritten_unless_forced(capsys):
    main(["recipes", "cp", "watch"])
    assert capsys.readouterr().out == "Wrote watch.yaml\n"
    assert Path("watch.yaml").read_text() == (recipes.recipes_folder() / "watch.yaml").read_text()
    Path("watch.yaml").write_text("mine")
    with pytest.raises(SystemExit, match=r"watch\.yaml exists\. Overwrite it with --force"):
        main(["recipes", "cp", "watch"])
    assert Path("watch.yaml").read_text() == "mine"
    main(["recipes", "cp", "watch", "--force"])
    assert Path("watch.yaml").read_text() != "mine"


def test_a_recipe_is_copied_to_a_new_name_or_folder():
    main(["recipes", "cp", "watch.yaml", "mine/first.yaml"])
    main(["recipes", "cp", "recipes/watch.yaml", "other/"])
    assert Path("mine/first.yaml").is_file() and Path("other/watch.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes", "cp", "wach"], "There is no recipe `wach`; did you mean `watch`?"),
        (["recipes", "cp", "zzz"], "There is no recipe `zzz`. List them: memsink recipes ls"),
        (["recipes", "rm"], "usage: memsink recipes ls"),
        (["fitt"], "memsink has no command `fitt`; did you mean `fit`?"),
        (["zzz"], "memsink has no command `zzz`. List them: memsink --help"),
        (
            ["fit", "-c", "confg.yaml"],
            "There is no config `confg.yaml`, neither as a file nor as a recipe; did you mean",
        ),
        (["fit", "--config=zzz"], "There is no config `zzz`, neither as a file nor as a recipe. List them"),
        (["validate"], "usage: memsink validate CONFIG"),
    ],
)
def test_a_wrong_word_is_answered_in_one_line(words, said):
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_of_the_users_wins_over_a_recipe_of_that_name():
    shipped = str(recipes.recipes_folder() / "watch.yaml")
    named = ["-c", "watch", "--config=watch.yaml", "--config", "recipes/watch.yaml", "--trainer.max_epochs=1"]
    assert with_recipes(named) == ["-c", shipped, f"--config={shipped}", "--config", shipped, "--trainer.max_epochs=1"]
    Path("watch.yaml").write_text("{}")
    assert with_recipes(["-c", "watch.yaml"]) == ["-c", "watch.yaml"]


# What is started ----------------------------------------------------------------------------------------------


def test_the_four_callbacks_join_those_of_the_config():
    assert kinds(built()) == [ModelSummary, *OURS]


@pytest.mark.parametrize(
    ("options", "bars"),
    [
        ([], [MemSinkProgressBar]),
        (["--trainer.callbacks+=TQDMProgressBar"], [TQDMProgressBar]),
        (["--trainer.enable_progress_bar=false"], []),
        (["--memsink.enabled=false"], [RichProgressBar]),
    ],
)
def test_the_progress_bar_is_ours_unless_another_is_wanted_or_none(options, bars):
    found = [type(callback) for callback in built(*options) if isinstance(callback, ProgressBar)]
    assert found == bars or (found, bars) == ([TQDMProgressBar], [RichProgressBar])  # Lightning's own, whichever


def test_one_word_switches_it_off():
    assert kinds(built("--memsink.enabled=false")) == [ModelSummary]


def test_options_of_the_group_reach_the_callbacks():
    callbacks = built("--memsink.detector.k=16", "--memsink.report.path=null", "--memsink.tracker.identity=content")
    found = {type(callback): callback for callback in callbacks}
    assert found[MemorizationDetector].rule.k == 16
    assert found[RunReport].path is None
    assert found[LossTracker].sample_ids.identity == "content"


def test_a_mitigation_is_a_callback_by_name_and_null_switches_it_off():
    overlay = written("mitigate.yaml", memsink={"mitigation": {"class_path": f"{__name__}.Mitigation"}})
    on = built("-c", overlay, "--memsink.mitigation.strength=0.9")
    assert kinds(on) == [ModelSummary, *OURS, Mitigation]
    assert next(callback for callback in on if type(callback) is Mitigation).strength == 0.9
    assert kinds(built("--memsink.mitigation=Mitigation"))[-1] is Mitigation
    assert kinds(built("-c", overlay, "--memsink.mitigation=null")) == [ModelSummary, *OURS]


def test_an_overlay_appends_callbacks():
    overlay = written("more.yaml", trainer={"callbacks+": [{"class_path": f"{__name__}.Mitigation"}]})
    assert kinds(built("-c", overlay)) == [ModelSummary, Mitigation, *OURS]


def test_a_callback_that_the_config_lists_is_used_as_listed():
    """Two trackers would count every sample twice."""
    tracker = {"class_path": "lightning_memsink.LossTracker", "init_args": {"depth": 7}}
    callbacks = built("-c", written("own.yaml", trainer={"callbacks+": [tracker]}))
    assert sorted(map(str, kinds(callbacks))) == sorted(map(str, [ModelSummary, *OURS]))
    assert next(callback for callback in callbacks if type(callback) is LossTracker).table.recent.shape[1] == 7


# What is said of a wrong config -------------------------------------------------------------------------------


def test_a_valid_config_is_ok_and_said_to_do(capsys):
    assert main(["validate", "config.yaml", "--trainer.max_steps=5"]) == 0
    assert capsys.readouterr().out == (
        "OK: would fit BoringModel on Digits for 5 steps, watched for memorization, mitigation: none\n"
    )


def test_every_misspelt_key_and_class_has_a_line_of_its_own():
    wrong = written(
        "wrong.yaml",
        trainr={},
        trainer={
            "max_epoch": 1,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelSummary", "init_args": {"max_dept": 2}}],
        },
        memsink={"detector": {"kk": 1}, "alpha": 0.1},
        model={"class_path": "lightning_memsink.examples.text.CausaLM"},
        data={"class_path": "lightning_memsnk.demo.PythonDocs", "init_args": {"batch_size": 8}},
    )
    assert sorted(refusal(wrong).splitlines()) == [
        "wrong.yaml: `data.class_path`: there is no module `lightning_memsnk`; did you mean `lightning_memsink`?",
        "wrong.yaml: `memsink.alpha` is no option; did you mean `memsink.detector.alpha`?",
        "wrong.yaml: `memsink.detector.kk` is no option; did you mean `k`?",
        "wrong.yaml: `model.class_path`: `lightning_memsink.examples.text` has no `CausaLM`; did you mean `CausalLM`?",
        "wrong.yaml: `trainer.callbacks[0].init_args.max_dept` is no option; did you mean `max_depth`?",
        "wrong.yaml: `trainer.max_epoch` is no option; did you mean `max_epochs`?",
        "wrong.yaml: `trainr` is no option; did you mean `trainer`?",
    ]


def test_an_overlay_with_init_args_alone_is_checked_against_the_class_named_before():
    overlay = written("overlay.yaml", data={"init_args": {"bach_size": 3}})
    said = "overlay.yaml: `data.init_args.bach_size` is no option; did you mean `batch_size`?"
    assert refusal("config.yaml", "-c", overlay) == said


@readable
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"trainer": {"max_epochs": "many"}}, "`trainer.max_epochs`: expected int or None, got `many`"),
        ({"memsink": {"detector": {"k": "x"}}}, "`memsink.detector.k`: expected int, got `x`"),
        (
            {"memsink": {"detector": {"method": "kn"}}},
            "`memsink.detector.method`: expected one of knn, ridge, got `kn`; did you mean `knn`?",
        ),
        (
            {"memsink": {"mitigation": "NoSuchClass"}},
            "`memsink.mitigation`: there is no class `NoSuchClass`; give its full path",
        ),
        (
            {"data": {"class_path": "lightning_memsink.examples.digits.Digits", "init_args": {"batch_size": "x"}}},
            "`data.batch_size`: expected int, got `x`",
        ),
        ({"data": {"class_path": "lightning_memsink.examples.text.TextFile"}}, "`data.path`: missing, and required"),
    ],
)
def test_a_wrong_value_is_one_line_of_place_expectation_and_finding(content, said):
    assert refusal("config.yaml", "-c", written("wrong.yaml", **content)) == said


@readable
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--memsink.detecor.k=3", "`--memsink.detecor.k` is no option; did you mean `memsink.detector.k`?"),
        ("--alpha=3", "`--alpha` is no option; did you mean `memsink.detector.alpha`?"),
        ("--data.batchsize=3", "`data.batchsize` is no option; did you mean `batch_size`?"),
    ],
)
def test_a_misspelt_option_is_one_line_too(option, said):
    assert refusal("config.yaml", option) == said
    with pytest.raises(SystemExit) as refused:
        main(["fit", "-c", "config.yaml", option])
    assert refused.value.code == said


def test_what_is_no_yaml_or_no_mapping_is_said():
    Path("torn.yaml").write_text("trainer: {\n  max_epochs: [")
    assert refusal("torn.yaml").startswith("torn.yaml: no valid YAML ")
    assert "line 2" in refusal("torn.yaml") and "\n" not in refusal("torn.yaml")
    Path("list.yaml").write_text("- a\n- b\n")
    assert refusal("list.yaml").startswith("list.yaml: a config maps options to values")


@readable
def test_a_config_without_a_model_says_that_it_is_missing():
    assert refusal(written("empty.yaml", trainer={})) == "`model`: missing, and required"


def test_help_is_a_screenful(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    assert "memsink recipes" not in capsys.readouterr().err
