"""Every block of the README does what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_memsink import memsink
from lightning_memsink.cli import main
from lightning_memsink.reporting.run_files import write_report
from tests.support.made_up import made_up
from tests.support.small_runs import Rows, TinyLM, chain, control_loader, fit, train_loader

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.split("#")[0].strip() for language, block in BLOCKS if not language for line in block.splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def test_every_python_block_runs(here, monkeypatch):
    """On a tiny model and three epochs; the report is where the README says."""
    code, sources = [block for language, block in BLOCKS if language == "python"]

    def short(**options):
        return Trainer(max_epochs=3, enable_progress_bar=False, enable_checkpointing=False, **options)

    monkeypatch.setattr("lightning.pytorch.Trainer", short)
    known = {"model": TinyLM(), "train_loader": train_loader(), "control_loader": control_loader()}
    exec(code, known)
    assert (here / "memsink_report.md").exists()
    exec("from lightning_memsink import SampleGradientMask\n" + sources, known)
    assert [type(each).__name__ for each in known["callbacks"]][-1] == "SampleGradientMask"


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert named == ["demo", "test"] and set(named) <= set(targets)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_every_command_of_the_readme_is_understood(here, capsys):
    """``fit`` is only validated, and ``audit`` stops where its files are read; the others run."""
    for name in ("hold", "plain"):
        write_report(made_up().findings(), here / "runs" / name / "memsink_report.md")
    texts = chain(40, seed=1)
    (here / "data.jsonl").write_text("\n".join(json.dumps({"text": str(row.tolist())}) for row in texts))
    callbacks = memsink(source=lambda batch: ["books"] * len(batch["input_ids"]), budget={"default": 1.0})
    fit(callbacks, train=DataLoader(Rows(texts), 8), max_epochs=2, val_check_interval=2)
    for line in (line for line in LINES if line.startswith("memsink ")):
        command = shlex.split(line)[1:]
        if command[0] == "audit":
            with pytest.raises(SystemExit, match=r"There is no file suspects\.jsonl"):
                main(command)
            continue
        if command[0] == "fit":
            command[0] = "validate"
        assert main(command) == 0, line
    assert "OK: would fit" in capsys.readouterr().out


def test_every_link_and_picture_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_an_option_that_nobody_has_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"memsink\(\) has no option `identitty`: did you mean `identity`\?"):
        memsink(identitty="content")
