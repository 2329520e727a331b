"""Trainings that end badly: nothing of ours is left behind, what was known is whole, and the next one is as if new."""

import os
import signal
import time
import warnings
from multiprocessing import get_context

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import get_worker_info

from lightning_memsink import (
    Goldfish,
    LossTruncation,
    MemSinks,
    SampleGradientMask,
    SinkDropout,
    SinkGradientMask,
    SinkLocalizer,
)
from lightning_memsink.detection import evaluate as judging
from lightning_memsink.examples.resumable import EpochShuffledSampler, ResumableBatchSampler, ResumableLoader
from lightning_memsink.samples.loss_table import LossTable
from tests.support.small_runs import TRAIN, Rows, TinyLM, fit, snapshot, train_loader, watch

MITIGATIONS = {
    "hold": lambda: [SampleGradientMask(at=0.2, k=4)],
    "route": lambda: [SampleGradientMask(mode="route")],
    "localized": lambda: [SinkLocalizer(every=1, fraction=0.1), SinkGradientMask()],
    "margin": lambda: [SinkLocalizer(every=2, objective="margin", agreement=True)],
    "dropout": lambda: [SinkLocalizer(every=1, fraction=0.1), SinkDropout()],
    "sinks by design": lambda: [MemSinks(pool_fraction=0.3, active_fraction=0.05)],
    "goldfish": lambda: [Goldfish(k=3)],
    "truncation": lambda: [LossTruncation(0.1)],
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def traces(module, loader):
    """What is not as it was before the fit."""
    found = [f"{name}.{kind}" for name, part in module.named_modules() for kind in HOOKS if getattr(part, kind)]
    found += [name for name, weight in module.named_parameters() if weight._backward_hooks]
    found += [f"{name} evaluates" for name, part in module.named_modules() if not part.training]
    optimizers = module.trainer.optimizers if module._trainer else []
    for optimizer in optimizers:
        found += [kind for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks") if vars(optimizer)[kind]]
    if torch.overrides._get_current_function_mode() is not None:
        found.append("a torch function mode")
    if module._trainer and "process_dataloader" in vars(module.trainer.strategy):
        found.append("strategy.process_dataloader")
    return [*found, *(set(vars(loader)) - set(vars(train_loader())))]


class Fails(TinyLM):
    """Raises once, at the tenth step, in one of the places where the user's own code runs."""

    def __init__(self, where):
        super().__init__()
        self.where, self.failed = where, False

    def fail(self, where):
        if where == self.where and not self.failed and self.trainer.global_step >= 9:
            self.failed = True
            raise RuntimeError("the user's own")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.fail("training_step")
        return loss

    def on_before_backward(self, loss):
        self.fail("on_before_backward")

    def on_after_backward(self):
        self.fail("on_after_backward")

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.fail("optimizer_step")

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.fail("validation_step")


PLACES = ("training_step", "on_before_backward", "on_after_backward", "optimizer_step", "validation_step")


@pytest.mark.parametrize("name", MITIGATIONS)
def test_an_exception_leaves_no_trace_and_the_next_fit_is_as_if_new(name):
    """Wherever the user's code raises: the same module, with the weights it began with, then trains bit for bit."""
    expected = snapshot(*fit([*watch(), *MITIGATIONS[name]()], Fails("nowhere"), max_epochs=1))
    for where in PLACES:
        module, loader = Fails(where), train_loader()
        start = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(RuntimeError, match="the user's own"):
            fit([*watch(), *MITIGATIONS[name]()], module, train=loader, max_epochs=1)
        if where == "validation_step":
            module.train()  # Lightning's own doing: it leaves the module as the validation loop had it
        assert traces(module, loader) == [], where
        module.load_state_dict(start)
        assert snapshot(*fit([*watch(), *MITIGATIONS[name]()], module, train=loader, max_epochs=1)) == expected, where


@pytest.mark.parametrize("name", MITIGATIONS)
def test_an_exception_at_the_start_leaves_no_trace(name):
    """Before anything was trained, and after hooks were attached."""

    class Refuses(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("the user's own")

    module, loader = TinyLM(), train_loader()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit([Refuses(), *watch(), *MITIGATIONS[name]()], module, train=loader)
    assert traces(module, loader) == []


# Signals --------------------------------------------------------------------------------------------------------------


class Waits(Callback):
    """At the thirtieth step, for a signal."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 30:
            (self.folder / "ready").touch()
            while not trainer.received_sigterm:
                time.sleep(0.01)


def resumable():
    return ResumableLoader(
        Rows(TRAIN), batch_sampler=ResumableBatchSampler(EpochShuffledSampler(len(TRAIN)), 16, drop_last=False)
    )


def held():
    return [*watch(), SampleGradientMask(at=0.2, k=4)]


def saving(folder):
    return {"enable_checkpointing": True, "default_root_dir": folder}


def train_until_signalled(folder, ours):
    """In a process of its own: trains until Lightning ends it, then writes down what is left."""
    warnings.simplefilter("ignore")  # Lightning's, about a Trainer that keeps a checkpoint of exceptions only
    module, loader = TinyLM(), resumable()
    crew = [*(held() if ours else []), Waits(folder), OnExceptionCheckpoint(folder)]
    try:
        fit(crew, module, train=loader, max_epochs=1000, **saving(folder))
    except BaseException as end:
        facts = {"end": f"{type(end).__name__}({end})", "traces": traces(module, loader), "step": module.global_step}
        if ours:
            state = crew[0].state_dict()
            waiting = sum(len(visit["ids"]) for visit in state["visits"])
            facts["visits"] = int(state["table"]["columns"]["exposures"].sum()) + waiting
        torch.save(facts, folder / "facts.pt")
        raise


@pytest.fixture
def sigint():
    """As on a terminal: what a shell runs in the background ignores Ctrl-C from birth."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning ignores it for good once it has come


def signalled(folder, number, ours):
    child = get_context("fork").Process(target=train_until_signalled, args=(folder, ours))
    child.start()
    try:
        while not (folder / "ready").exists() and child.is_alive():
            time.sleep(0.02)
        os.kill(child.pid, number)
        child.join(60)
    finally:
        child.kill()
        child.join()
    return torch.load(folder / "facts.pt") | {"code": child.exitcode}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_training_as_it_ends_without_us_and_the_resumed_run_is_as_if_uninterrupted(
    number, tmp_path, sigint
):
    """Lightning's checkpoint of that moment, taken between two of ours, has the whole ledger."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "ours").mkdir()
    plain, ours = signalled(tmp_path / "plain", number, False), signalled(tmp_path / "ours", number, True)
    assert (ours["end"], ours["code"]) == (plain["end"], plain["code"])
    assert ours["traces"] == plain["traces"] == []
    assert (ours["step"], ours["visits"]) == (30, len(TRAIN) + 9 * 16)
    checkpoint, epochs = tmp_path / "ours" / "on_exception.ckpt", 3
    options = {"ckpt_path": str(checkpoint), **saving(tmp_path)}
    resumed = fit(held(), train=resumable(), max_epochs=epochs, **options)
    assert snapshot(*resumed) == snapshot(*fit(held(), train=resumable(), max_epochs=epochs))


# Workers and loggers --------------------------------------------------------------------------------------------------


class Deadly(Rows):
    """Its third batch kills the worker that fetches it, as the kernel does when memory runs out."""

    def __getitem__(self, index):
        if index == 40 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_worker_that_dies_leaves_no_trace_and_a_whole_ledger():
    from torch.utils.data import DataLoader

    module, loader, crew = TinyLM(), DataLoader(Deadly(TRAIN), 16, num_workers=1), held()
    # Torch's own words, or those of the pipe that the worker died on: whichever is noticed first.
    with pytest.raises((RuntimeError, ConnectionError), match=r"DataLoader worker|reset by peer"):
        fit(crew, module, train=loader)
    assert traces(module, loader) == []
    visits = crew[0].state_dict()["visits"]
    assert module.global_step == len(visits) and all(len(visit["ids"]) == 16 for visit in visits)


# Models of another build ----------------------------------------------------------------------------------------------


class Tied(TinyLM):
    """The embedding is the output too."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 16), self.head())

    def head(self):
        layer = torch.nn.Linear(16, 32, bias=False)
        layer.weight = self.embed.weight
        return layer


class NoHiddenLayer(TinyLM):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Linear(32, 32)


@pytest.mark.parametrize("kind", [Tied, NoHiddenLayer])
def test_tied_weights_and_a_model_without_a_hidden_layer_are_watched_and_held(kind):
    """Watching changes no weight, and holding leaves gradients out; only who localizes needs a hidden layer."""
    plain, watched = fit([], kind())[1], fit(watch(), kind())[1]
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), watched.parameters(), strict=True))
    crew = held()
    fit(crew, kind())
    assert crew[-1].interventions.total("acted") > 0
    if kind is NoHiddenLayer:
        with pytest.raises(ValueError, match="hidden"):
            fit([*watch(), SinkLocalizer()], kind())


# Ctrl-C in the middle of ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("home", "name"), [(LossTable, "describe"), (judging, "summarize")])
def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(home, name, monkeypatch, sigint):
    """Table and verdicts are whole on the way out, where Lightning may save them."""
    original = getattr(home, name)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(home, name, interrupted)
    crew, module = held(), TinyLM()
    with pytest.raises(SystemExit):
        fit(crew, module)
    table, flags = crew[0].table, crew[1].flags
    assert module.global_step == 7 and int(table.exposures.sum()) == 7 * 16
    assert (table.features[:, 0] > 0).all()
    assert len(flags.evaluations) == (name == "summarize")
