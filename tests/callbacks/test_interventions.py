"""What a mitigation did is counted between evaluations, each of which closes one record, and shown at each."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

import lightning_memsink
from lightning_memsink import Ledger, LiveCurves, SinkLocalizer
from lightning_memsink.callbacks.registry import mitigations
from tests.support.small_runs import CONTROLS, Rows, fit, watch


@pytest.mark.parametrize("own_controls", [False, True], ids=["validation", "controls of its own"])
@pytest.mark.parametrize("name", [entry.name for entry in mitigations()])
def test_every_evaluation_closes_one_record_and_logs_it(name, own_controls):
    curves = LiveCurves()
    mitigation = getattr(lightning_memsink, name)()
    options = {"controls": DataLoader(Rows(CONTROLS), 40), "control_every": 10} if own_controls else {}
    crew = [mitigation, curves, *watch(**options), SinkLocalizer(every=2)]
    run, _ = fit(crew, max_epochs=3, **({"controls": "none"} if own_controls else {}))
    evaluations = [evaluation.step for evaluation in Ledger.of(run).flags.evaluations]
    records = Ledger.of(run).interventions[name].records
    steps = [record["step"] for record in records]
    assert len(evaluations) > 2 and set(steps) <= {*evaluations, run.global_step} and steps == sorted(set(steps))
    shown = {row["step"] for row in curves.history if f"mitigation/{name}/removed" in row}
    acting = [record["step"] for record in records if record["visits"]]
    assert set(acting) - {run.global_step} <= shown and len(acting) >= len(evaluations) - 1
