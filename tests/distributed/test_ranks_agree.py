"""The same global batches on one, two and three processes: the same ledger, verdicts and weights, on every rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from lightning_memsink import SinkLocalizer
from lightning_memsink.detection.verdicts import Verdict
from tests.distributed.launching import forked
from tests.distributed.runs import (
    MITIGATION,
    VISITS,
    WATCH,
    are_canaries,
    assert_nearly_equal,
    crew,
    differences,
    ranks,
    train,
)

OF_EACH_PROCESS = ("SinkDropout", "Goldfish")
"""Mitigations that draw, or rescale, per process: their runs differ from one on a single process."""


def run(folder: Path, world: int, *mitigations: str, **options: Any) -> dict[str, Any]:
    """The facts of a run, equal on all ranks to the bit."""
    folder.mkdir()
    spread = {"strategy": "ddp_fork", "devices": world} if world > 1 else {}
    forked(lambda: train(folder, crew(*mitigations), **spread, **options), folder)
    first, *others = ranks(folder)
    assert first["world"] == len(others) + 1 == world
    for other in others:
        assert differences(first, other) == []
    return first


def numbers_in(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def compare(one: dict[str, Any], several: dict[str, Any]) -> None:
    for name in ("weights", "losses", "controls", "actions", "extraction"):
        assert_nearly_equal(one[name], several[name], name)
    for name in ("verdict", "streak", "onset_step", "onset_exposures", "gap", "p"):
        assert_nearly_equal(one["flags"][name], several["flags"][name], name)
    assert one["onset"] == several["onset"]
    # Windows count batches, of which several processes have more; the rows are means over them.
    rows = [{**row, "concentration": None} for row in one["attribution"]["rows"]]
    assert_nearly_equal(rows, [{**row, "concentration": None} for row in several["attribution"]["rows"]], "attribution")
    assert (one["sinks"] is None) == (several["sinks"] is None)
    assert numbers_in(str(one["sinks"])) == pytest.approx(numbers_in(str(several["sinks"])), abs=2e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without mitigation on one process."""
    return run(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_measure_what_one_process_measures(world, alone, tmp_path):
    found = run(tmp_path / "run", world)
    assert int(found["losses"]["columns"]["exposures"].sum()) == 3 * len(VISITS)
    assert found["flags"]["verdict"][are_canaries(found["losses"]["ids"])].tolist() == [Verdict.MEMORIZED] * 4
    assert found["attribution"]["rows"][-1]["movement"], "there is a norm of steps"
    compare(alone, found)


@pytest.mark.parametrize("name", [name for name in MITIGATION if name not in OF_EACH_PROCESS])
def test_a_mitigation_on_two_processes_does_what_it_does_on_one(name, alone, tmp_path):
    one, several = run(tmp_path / "one", 1, name), run(tmp_path / "two", 2, name)
    if name == "MemSinks":  # what was kept for the certificate differs: each process keeps of its own batches
        for samples, own, dropped, *_ in (numbers_in(one["certificate"]), numbers_in(several["certificate"])):
            assert samples >= 16 and own < dropped
    assert not torch.equal(one["weights"]["head.weight"], alone["weights"]["head.weight"]), "it acted"
    compare(one, several)


@pytest.mark.parametrize("name", OF_EACH_PROCESS)
def test_random_numbers_of_each_process_leave_weights_and_ledgers_in_sync(name, alone, tmp_path):
    found = run(tmp_path / "run", 3, name)
    [done] = found["actions"].values()
    assert sum(record["visits"] for record in done["records"]) == 3 * len(VISITS)
    assert sum(record["acted"] for record in done["records"]) > 0
    assert not torch.equal(found["weights"]["head.weight"], alone["weights"]["head.weight"])


ENGINES = {
    "accumulation": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "clipping": {"gradient_clip_val": 0.5},
    "find_unused_parameters": {"strategy": "ddp_fork_find_unused_parameters_true"},
    "static_graph": {"strategy": DDPStrategy(start_method="fork", static_graph=True)},
    "fp16-mixed": {"precision": None, "plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_of_ddp_keep_every_rank_the_same(engine, tmp_path):
    options = {"strategy": "ddp_fork", "devices": 2, **ENGINES[engine]}
    forked(lambda: train(tmp_path, crew("hold", "SinkGradientMask", "MemSinks"), **options), tmp_path)
    first, other = ranks(tmp_path)
    assert differences(first, other) == []
    assert torch.isfinite(first["losses"]["columns"]["last_loss"]).all()
    assert len(first["actions"]) == 3 and len(WATCH) == 6


def test_gradients_are_compared_with_those_of_controls_on_every_rank(tmp_path):
    watching = [*crew()[:2], SinkLocalizer(every=2, agreement=True)]
    forked(lambda: train(tmp_path, watching, strategy="ddp_fork", devices=2), tmp_path)
    first, other = ranks(tmp_path)
    assert differences(first, other) == []
    rows = [row["agreement"] for row in first["attribution"]["rows"]]
    assert all(-1 <= cosine <= 1 for row in rows for cosine in row.values())
    assert rows[-1]["memorized"] < rows[-1]["learned"], "gradients of memorized samples do not help other samples"


def test_accumulation_without_sync_measures_what_one_process_measures(tmp_path):
    options = {"accumulate_grad_batches": 2}
    compare(run(tmp_path / "one", 1, "hold", **options), run(tmp_path / "two", 2, "hold", **options))
