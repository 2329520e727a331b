"""A callback of ours in a Trainer of `pytorch_lightning`: it works, as in one of `lightning.pytorch`."""

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import FSDPStrategy

import lightning_memsink
from lightning_memsink import Ledger, memsink
from lightning_memsink._lightning import is_a
from lightning_memsink.reporting.loggers import logged_run
from tests.support.small_runs import TinyLM, control_loader, snapshot, train_loader


class OtherLM(pytorch_lightning.LightningModule):
    """`TinyLM` in the other namespace."""

    def __init__(self) -> None:
        super().__init__()
        twin = TinyLM()
        self.embed, self.mlp = twin.embed, twin.mlp

    loss, training_step, validation_step = TinyLM.loss, TinyLM.training_step, TinyLM.validation_step
    logits, configure_optimizers = TinyLM.logits, TinyLM.configure_optimizers


def fit(namespace, module, callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ckpt_path = options.pop("ckpt_path", None)
    options = {"accelerator": "cpu", "max_epochs": 2, "val_check_interval": 7, **quiet, **options}
    run = namespace.Trainer(callbacks=callbacks, **options)
    run.fit(module, train_loader(), control_loader(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("mitigation", [None, "SampleGradientMask", "MemSinks"])
def test_both_namespaces_give_the_same_run_to_the_bit(mitigation):
    runs = []
    for namespace, kind in ((lightning.pytorch, TinyLM), (pytorch_lightning, OtherLM)):
        acts = None if mitigation is None else getattr(lightning_memsink, mitigation)()
        module = kind()
        callbacks = memsink(acts, path=None, identity="content", localize=mitigation is None, k=4)
        runs.append(snapshot(fit(namespace, module, callbacks), module))
    assert runs[0] == runs[1]


def test_a_checkpoint_of_the_other_namespace_holds_the_ledger_and_resumes(tmp_path):
    keep = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, filename="last")
    callbacks = [*memsink(path=None, identity="content"), keep]
    first = fit(pytorch_lightning, OtherLM(), callbacks, enable_checkpointing=True)
    again, path = memsink(path=None, identity="content"), str(tmp_path / "last.ckpt")
    run = fit(pytorch_lightning, OtherLM(), [*again, keep], ckpt_path=path, enable_checkpointing=True)
    before, after = Ledger.of(first).losses, Ledger.of(run).losses
    assert torch.equal(before.exposures, after.exposures) and torch.equal(before.last_loss, after.last_loss)


def test_a_module_of_the_other_namespace_is_refused_by_lightning_itself():
    """Before any callback is called: the module, not ours, is what can't be there."""
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        fit(lightning.pytorch, OtherLM(), memsink(path=None))


def test_twins_count_as_one_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = pytorch_lightning.loggers.WandbLogger(save_dir=tmp_path)
    assert is_a(logger, WandbLogger) and not isinstance(logger, WandbLogger)
    assert is_a(pytorch_lightning.strategies.FSDPStrategy(), FSDPStrategy)
    assert not is_a(pytorch_lightning.loggers.CSVLogger(tmp_path), WandbLogger)
    logged_run(logger).keep([])
