"""Every worked example of CONTRIBUTING.md runs, and does what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_memsink.losses import readers, step_reader
from lightning_memsink.losses.capture import StepCapture
from tests.support.reading import captured

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def block(path: str, number: int = 0) -> str:
    return [text for text in BLOCKS if text.startswith(f"# {path}")][number]


def run(*blocks: str) -> dict[str, Any]:
    """Runs the blocks as one module, so that its classes can be pickled, and returns its names."""
    module = sys.modules["contributed"] = ModuleType("contributed")
    for text in blocks:
        exec(compile(text, "CONTRIBUTING.md", "exec"), vars(module))
    return vars(module)


def test_no_example_is_left_out():
    assert len(BLOCKS) == 11


def test_every_example_names_a_place_that_exists():
    root = Path(__file__).parents[1]
    for text in BLOCKS:
        path = root / re.match(r"# ([\w/.]+)", text)[1]
        assert path.exists() or path.parent.is_dir(), path


def test_a_loss_function(monkeypatch):
    entry = run(block("lightning_memsink/losses/readers.py"))["entry"]
    monkeypatch.setattr(readers, "_NODE_READERS", {**readers._NODE_READERS, **entry.nodes})
    batch = {"x": torch.randn(6, 3), "y": torch.randn(6, 4).sign()}
    model = torch.nn.Linear(3, 4)
    monkeypatch.setattr(step_reader, "FIRST_STEPS", 1)  # the second step is read from the graph alone, by the entry
    capture = StepCapture(model)
    pairs = zip(model(batch["x"]), batch["y"], strict=True)
    one_by_one = torch.stack([functional.soft_margin_loss(*pair) for pair in pairs]).detach()
    for is_watched in (True, False):
        found = captured(lambda batch: functional.soft_margin_loss(model(batch["x"]), batch["y"]), batch, 6, capture)
        assert capture.reader.is_watching is is_watched
        torch.testing.assert_close(found.losses, one_by_one)


def test_a_mitigation():
    names = run(
        block("lightning_memsink/mitigation/"),
        block("lightning_memsink/callbacks/loss_floor.py"),
        block("tests/conformity"),
    )
    assert names["at_least"](torch.tensor([0.05, 0.1, 2.0]), 0.1).tolist() == [0, 1, 1]
    entry = run(block("lightning_memsink/callbacks/registry.py"))["entry"]
    assert (entry.name, entry.is_mitigation) == ("LossFloor", True)


def test_a_localizer(monkeypatch):
    from lightning_memsink.localization.localizers import task

    monkeypatch.setattr(task, "METHODS", dict(task.METHODS))
    run(block("lightning_memsink/localization"), block("tests/conformity", 1))
    assert "first units" in task.METHODS


def test_a_statistic():
    null_share = run(block("lightning_memsink/detection"))["null_share"]
    uniform = torch.linspace(0, 1, 1001)[1:]
    assert null_share(uniform) == pytest.approx(1, abs=0.01)
    assert null_share(torch.cat([uniform, torch.zeros(1000)])) == pytest.approx(0.5, abs=0.01)


def test_a_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from lightning_memsink.reporting import loggers
    from tests.support.small_runs import fit, watch

    entry = run(
        block("lightning_memsink/reporting/loggers/csv_run.py"), block("lightning_memsink/reporting/loggers/__")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "RUNS", {**loggers.RUNS, **entry["entry"]})
        logger = CSVLogger(tmp_path)
        from lightning_memsink import LiveCurves

        fit([*watch(), LiveCurves()], max_epochs=1, logger=logger)
    logger.save()
    assert "memsink/listed" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_a_section_of_the_report():
    from lightning_memsink.samples.loss_table import LossTable

    section = run(block("lightning_memsink/reporting/run_sections.py"))["entry"]
    table = LossTable()
    table.record(torch.tensor([3, 4, 3]), torch.rand(3), torch.tensor([0, 0, 1]), torch.ones(3))

    class Findings:
        pass

    findings = Findings()
    findings.table = table
    assert section.condition(findings) and section.sentences(findings) == [
        "The most visited sample was visited 2 times."
    ]
