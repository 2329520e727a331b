"""Models that are built in the module's own `setup` or `configure_model`, which Lightning calls after callbacks'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import TinyLM, control_loader, fit, trainer, watch, weights

CREWS = {
    "SinkLocalizer": lambda: [SinkLocalizer(every=2, agreement=True)],
    "MemSinks": lambda: [MemSinks(certify=8)],
    "SinkDropout": lambda: [SinkLocalizer(every=2), SinkDropout(p=1.0)],
    "SinkGradientMask": lambda: [SinkLocalizer(every=2), SinkGradientMask()],
    "route": lambda: [SampleGradientMask("route")],
}


class Late(TinyLM):
    """Builds its layers when Lightning calls the hook for it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.waiting = where, [self.embed, self.mlp]  # a list, whose modules are not the module's own
        self.embed, self.mlp = None, None  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self.build()

    def build(self) -> None:
        if self.embed is None:
            self.embed, self.mlp = self.waiting  # type: ignore[assignment]


@pytest.mark.parametrize("where", ["setup", "configure_model"])
@pytest.mark.parametrize("crew", CREWS)
def test_a_model_that_is_built_late_is_measured_like_any_other(where, crew):
    ours, theirs = ([*watch(), *CREWS[crew]()] for _ in range(2))
    run, model = fit(ours)
    late_run, late = fit(theirs, Late(where))
    assert torch.equal(weights(model), weights(late))
    ledger, late_ledger = Ledger.of(run), Ledger.of(late_run)
    for name, actions in ledger.interventions.items():
        assert actions.total("acted") > 0 and actions.total("acted") == late_ledger.interventions[name].total("acted")
    if ledger.get(Ledger.attribution) is not None:
        assert repr(ledger.attribution.rows) == repr(late_ledger.attribution.rows)
        assert late_ledger.attribution.rows[-1].shares and late_ledger.attribution.rows[-1].norms
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in late.modules())


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_a_localizer_of_a_late_model_resumes_from_a_checkpoint(where, tmp_path):
    def crew() -> list[Any]:
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
        return [*watch(), SinkLocalizer(every=2), keep]

    options: dict[str, Any] = {"enable_checkpointing": True, "val_check_interval": 8}
    whole, _ = fit(crew(), Late(where), **options)
    last, _ = fit(crew(), Late(where), ckpt_path=tmp_path / "epoch=1.ckpt", **options)
    assert repr(Ledger.of(whole).attribution.rows) == repr(Ledger.of(last).attribution.rows)
    with pytest.raises(ValueError, match=r"The checkpoint holds attribution of hidden layers mlp\.2 \(128\), but the"):
        other = Late(where)
        other.waiting[1] = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        other.strict_loading = False
        other.on_load_checkpoint = lambda saved: saved.update(state_dict={})  # type: ignore[method-assign]
        fit(crew(), other, ckpt_path=tmp_path / "epoch=1.ckpt", **options)


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_the_pool_is_left_out_in_whichever_loop_a_late_model_runs_first(loop):
    class WithOtherLoops(Late):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    def loss(callbacks: list[Any]) -> float:
        run, model = trainer(callbacks), WithOtherLoops("configure_model")
        if loop == "predict":
            return float(torch.stack(run.predict(model, control_loader())).mean())
        getattr(run, loop)(model, control_loader(), verbose=False)
        return float(next(iter(run.callback_metrics.values())))

    assert loss([]) != loss([MemSinks()])
