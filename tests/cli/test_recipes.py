"""Each shipped recipe is valid, commented and runs."""

import json
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from lightning_memsink.cli import main
from lightning_memsink.cli.recipes import is_for_audit, is_overlay, recipe_names, recipes_folder
from lightning_memsink.examples.corpora import byte_level_bpe, python_code, python_docs
from lightning_memsink.examples.digits import Digits
from lightning_memsink.examples.text import CausalLM, PythonDocs, TextFile
from lightning_memsink.extraction.canaries import CanaryGroup

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL_DOCS = {"background": 128, "controls": 60, "repeats": [1, 8], "per_rung": 2, "canaries": 2, "easy": 2, "twins": 8}
SMALL_GPT = ["--model.n_layer=1", "--model.n_embd=16", "--model.n_head=2"]
SHORT = {
    "watch": [*SMALL_GPT, *(f"--data.{name}={value}" for name, value in SMALL_DOCS.items())],
    "watch_hf": [*SMALL_GPT, "--data.path=text.txt", "--data.context=16", "--data.batch_size=4"],
    "packed": [*SMALL_GPT, "--data.documentation=60", "--data.code=4", "--data.controls=20", "--data.batch_size=8"],
    "classification": ["--model.hidden=16"],
}
STEPS = ["--trainer.max_steps=6", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a text of some hundred different sentences; W&B offline, and nothing on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["memsink"])
    text = "\n\n".join(f"Number {n} squared is {n * n}, and its cube is {n**3}. " * 3 for n in range(300))
    Path("text.txt").write_text(text)
    return tmp_path


@pytest.fixture(autouse=True)
def part_of_the_docs(monkeypatch):
    """A tenth of Python's documentation, so that the tokenizer is soon trained."""
    monkeypatch.setattr("lightning_memsink.examples.text.python_docs", _part_of_the_docs)
    monkeypatch.setattr("lightning_memsink.examples.packed.python_docs", _part_of_the_docs)
    monkeypatch.setattr("lightning_memsink.examples.packed.python_code", _part_of_the_code)


@cache
def _part_of_the_docs():
    return python_docs()[::10]


@cache
def _part_of_the_code():
    return python_code()[::10]


BASES = [name for name in recipe_names() if not is_overlay(name) and not is_for_audit(name)]
OVERLAYS = [name for name in recipe_names() if is_overlay(name)]
MITIGATIONS = [name for name in OVERLAYS if name.startswith("mitigate/")]


@pytest.mark.parametrize("name", BASES)
def test_a_recipe_validates(name, here, capsys):
    assert main(["validate", name]) == 0
    assert capsys.readouterr().out.startswith("OK: would fit ")


@pytest.mark.parametrize("base", BASES)
def test_every_overlay_validates_on_every_recipe(base, here, capsys):
    """Parsed one after the other, so that later files win: all at once end in the last one, skip."""
    overlays = [word for name in OVERLAYS for word in ("-c", name)]
    assert main(["validate", base, *overlays]) == 0
    assert capsys.readouterr().out.rstrip().endswith("mitigation: SampleGradientMask")


@pytest.mark.parametrize("name", MITIGATIONS)
def test_an_overlay_runs_on_the_demo_and_the_report_says_what_it_did(name, here, capsys):
    main(["fit", "-c", "watch", "-c", name, *STEPS, *SHORT["watch"]])
    assert "What was done" in capsys.readouterr().out
    assert Path("memsink_report_files/mitigation.png").is_file()


def test_the_demo_is_kept_as_an_audit_takes_it(here, capsys):
    """Trained for long enough to know its most repeated sequences."""
    ladder = ["--data.repeats=[1,64]", "--data.twins=16", "--model.n_embd=32", "--trainer.max_steps=40"]
    fit = ["fit", "-c", "watch", "-c", "audit/keep_demo", *SHORT["watch"], *ladder, "--trainer.max_epochs=-1"]
    main([*fit, "--model.lr=0.01", "--trainer.val_check_interval=20", "--trainer.check_val_every_n_epoch=null"])
    files = {name: f"--{name}=demo_model/{name}.jsonl" for name in ("suspects", "controls")}
    assert main(["audit", "--model=demo_model", *files.values(), "--out=audit", "--probe.closer=0"]) == 0
    bits = json.loads(Path("audit/report.json").read_text())["numbers"]["bits_a_token"]
    # A canary shown once is about one bit, more or less with the text of this Python's documentation: 3.11.2 gives 1.1.
    assert bits["canary x64"]["low"] > max(1, 2 * bits["canary x1"]["high"])
    assert bits["natural x64"]["low"] > bits["natural x1"]["high"]


def test_what_is_kept_for_an_audit_is_the_demo_alone(here):
    with pytest.raises(
        ValueError, match=r"KeepForAudit keeps the demo's CausalLM of PythonDocs, not DigitClassifier of Digits"
    ):
        main(["fit", "-c", "classification", "-c", "audit/keep_demo"])


def test_a_recipe_of_an_audit_says_so(here):
    with pytest.raises(SystemExit, match="memsink audit --config audit_smollm2"):
        main(["validate", "audit_smollm2"])


def test_an_overlay_alone_says_what_to_lay_it_over(here):
    with pytest.raises(SystemExit, match=r"`mitigate/hold` is an overlay: .* -c watch -c mitigate/hold"):
        main(["validate", "mitigate/hold"])


@pytest.mark.parametrize("value", ["SampleGradientMask", "null"])
def test_one_flag_toggles_a_mitigation(value, here, capsys):
    options = ["--memsink.mitigation.at=0.5"] if value != "null" else []
    assert main(["validate", "watch", "-c", "mitigate/goldfish", f"--memsink.mitigation={value}", *options]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"mitigation: {'none' if value == 'null' else value}")


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_of_a_recipe_has_a_comment_above_it(name):
    """With its type and default, where it is a value and no group or class."""
    lines = (recipes_folder() / f"{name}.yaml").read_text().splitlines()
    for above, line in pairwise(lines):
        key = re.match(r"^ *(- )?(\w+\+?):(.*)", line)
        if key and key[2] not in ("class_path", "init_args", "memsink", "trainer"):
            assert above.lstrip().startswith("#"), line
            assert not key[3] or line.lstrip().startswith("mitigation") or "(type: " in above or "," in above, line


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_runs_and_reports(name, here, capsys):
    """A few steps of it, with two evaluations, leave a report, curves and a W&B run."""
    main(["fit", "--config", name, *STEPS, *SHORT[name]])
    assert "samples memorized" in capsys.readouterr().out
    assert Path("memsink_report.md").is_file()
    assert list(Path("runs/csv").rglob("metrics.csv")) and list(Path("runs/wandb").rglob("*.wandb"))
    assert yaml.safe_load(Path("runs/config.yaml").read_text())["memsink"]["enabled"] is True


def test_a_recipe_runs_twice_in_one_folder(here):
    """Lightning alone would refuse the second, because a config of the first is there."""
    for _ in range(2):
        main(["fit", "-c", "classification", "--trainer.max_steps=1", "--memsink.enabled=false"])
        wandb.finish()


def test_a_missing_text_is_said_with_what_to_set(here):
    with pytest.raises(FileNotFoundError, match=r"Found no text at my_text\.txt\. Set data\.path"):
        main(["fit", "-c", "watch_hf", *SMALL_GPT])


# What the recipes train ---------------------------------------------------------------------------------------


def test_the_demo_model_has_a_million_parameters_no_dropout_and_its_own_loss():
    model = CausalLM()
    assert 0.9e6 < sum(weight.numel() for weight in model.parameters()) < 1.1e6
    batch = {"input_ids": torch.randint(1024, (2, 64))}
    loss = model.training_step(batch, 0)
    assert loss.isclose(model.training_step(batch, 0)) and loss.isclose(torch.tensor(1024.0).log(), atol=0.5)


def test_a_model_comes_from_a_folder_with_or_without_its_weights(tmp_path):
    saved = CausalLM(n_layer=1, n_embd=16, n_head=2).transformer
    saved.save_pretrained(tmp_path)
    same, fresh = CausalLM(pretrained=str(tmp_path)).transformer, CausalLM(config=str(tmp_path)).transformer
    name = "transformer.wte.weight"
    assert torch.equal(same.state_dict()[name], saved.state_dict()[name])
    assert fresh.state_dict()[name].shape == saved.state_dict()[name].shape
    assert not torch.equal(fresh.state_dict()[name], saved.state_dict()[name])
    assert same.training and fresh.training


def test_a_model_that_is_not_there_is_never_downloaded():
    with pytest.raises(FileNotFoundError, match=r"Found no model at gpt2\. Nothing is downloaded"):
        CausalLM(pretrained="gpt2")
    with pytest.raises(ValueError, match=r"takes `pretrained` .* or `config` .*, not both"):
        CausalLM(pretrained="a", config="b")


def test_the_demo_knows_what_it_planted():
    docs = PythonDocs(**SMALL_DOCS)
    docs.setup("fit")
    assert all(isinstance(rung, CanaryGroup) for rung in docs.rungs())
    assert [rung.repeats for rung in docs.rungs()] == [1, 8, 1, 8, 64]
    assert len(docs.train_dataloader().dataset) == 128 + (2 + 2) * (1 + 8) + 2 * 64
    assert docs.train_dataloader().dataset[0]["input_ids"].shape == (64,)
    assert len(docs.val_dataloader().dataset) == 60 + 3 * 8


def test_a_text_uses_the_tokenizer_of_the_model(here):
    with pytest.raises(FileNotFoundError, match=r"Found no tokenizer\.json in "):
        TextFile("text.txt", tokenizer=str(here)).setup("fit")
    byte_level_bpe([Path("text.txt").read_text()], 256).save("tokenizer.json")
    spelt, own = TextFile("text.txt", tokenizer=str(here), context=16), TextFile("text.txt", context=16)
    spelt.setup("fit")
    own.setup("fit")
    assert spelt.train.max() < 256 <= own.train.max()


def test_too_short_a_text_is_said(here):
    Path("short.txt").write_text("A sentence.")
    with pytest.raises(ValueError, match=r"short\.txt gives 0 training and 0 held-out sequences of 64 tokens: too few"):
        TextFile("short.txt").setup("fit")


def test_a_tenth_of_the_digits_has_a_wrong_label_in_training_and_controls_alike():
    clean, noisy = Digits(flipped=0.0, held_out=0.5), Digits(flipped=0.1, held_out=0.5)
    clean.setup("fit")
    noisy.setup("fit")
    wrong = clean.train.tensors[1] != noisy.train.tensors[1]
    assert torch.equal(wrong.nonzero().flatten(), noisy.flipped_rows)
    assert 0.07 < wrong.float().mean() < 0.13
    assert 0.07 < (clean.controls.tensors[1] != noisy.controls.tensors[1]).float().mean() < 0.13


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"The digits come with scikit-learn\. Install it: pip install scikit-learn"):
        Digits().setup("fit")
