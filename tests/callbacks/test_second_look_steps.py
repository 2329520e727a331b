"""A second look through steps of every kind: those that can't take the batch, raise, log, or pack documents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink import per_sample
from lightning_memsink.callbacks.loss_tracker import LossTracker
from tests.support.looking import watched
from tests.support.packed import LAYOUTS, laid_out, texts
from tests.support.packed_runs import Model, id_of, loss_of
from tests.support.small_runs import Rows, TinyLM, chain, fit, trainer

TEXTS = chain(40, seed=4)


def looked(model: LightningModule, mode: Any = "validation_step", **options: Any) -> Any:
    tracker, looks = watched(
        mode, options.pop("tracker", None), **{"at": "on_train_epoch_end", **options.pop("looks", {})}
    )
    fit(
        [tracker, looks],
        model,
        **{"train": DataLoader(Rows(TEXTS), 8), "max_epochs": 2, "val_check_interval": None, **options},
    )
    return looks


class OtherBatches(TinyLM):
    """Its validation takes batches of another kind."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss({"input_ids": batch["validation only"]})


class OtherRows(Rows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"validation only": self.tokens[index]}


def test_a_validation_step_that_cannot_take_the_batch_is_replaced_and_that_is_said():
    with pytest.warns(
        UserWarning, match="by training_step in evaluation mode, since .*KeyError: 'input_ids'|only"
    ) as said:
        looks = looked(OtherBatches(), controls=DataLoader(OtherRows(TEXTS), 20))
    assert [look.mode for look in looks.looks] == ["training_step"] * 2 and looks.second.mode == "training_step"
    assert [len(look.rows) for look in looks.looks] == [40, 40]
    assert len([each for each in said if "in evaluation mode" in str(each.message)]) == 1


class Manual(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, optimizer = self.loss(batch), self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class ManualOfOtherBatches(Manual):
    validation_step = OtherBatches.validation_step


class ManualWithoutValidation(Manual):
    validation_step = LightningModule.validation_step


def test_under_manual_optimization_only_the_validation_step_is_called():
    looks = looked(Manual())
    assert [len(look.rows) for look in looks.looks] == [40, 40] and not looks.second.refusal
    with pytest.warns(UserWarning, match="could not measure samples again .*KeyError.*recheck=0"):
        looks = looked(ManualOfOtherBatches(), controls=DataLoader(OtherRows(TEXTS), 20))
    assert [len(look.rows) for look in looks.looks] == [0, 0]
    looks = looked(ManualWithoutValidation(), controls="none")
    assert "manual optimization" in looks.second.refusal and [len(look.rows) for look in looks.looks] == [0, 0]
    with pytest.warns(UserWarning, match="could not measure samples again .*under manual optimization"):
        looks = looked(Manual(), "training")
    assert [len(look.rows) for look in looks.looks] == [0, 0]


class Raises(TinyLM):
    """Its step raises in evaluation mode."""

    def loss(self, batch: Any) -> Tensor:
        if not self.training and len(batch["input_ids"]) == 8:
            raise RuntimeError("no such thing\nin evaluation")
        return super().loss(batch)


def test_a_look_that_raises_is_said_once_and_no_more_are_tried_after_three():
    plain, _ = fit(
        [LossTracker(families=False)], Raises(), train=DataLoader(Rows(TEXTS), 8), max_epochs=5, val_check_interval=None
    )
    model = Raises()
    with pytest.warns(
        UserWarning, match="could not measure samples again .*raises RuntimeError: no such thing"
    ) as said:
        looks = looked(model, max_epochs=5)
    assert [len(look.rows) for look in looks.looks] == [0] * 5 and "no such thing" in looks.second.refusal
    assert len([each for each in said if "could not measure" in str(each.message)]) == 1
    before, after = plain.lightning_module.state_dict(), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Infinite(TinyLM):
    """The loss of texts that begin with certain tokens is not finite."""

    def loss(self, batch: Any) -> Any:
        tokens = batch["input_ids"]
        losses = F.cross_entropy(self.logits(tokens).transpose(1, 2), tokens[:, 2:], reduction="none").mean(1)
        return losses + torch.where(
            tokens[:, 0] % 4 == 0, torch.inf, torch.where(tokens[:, 0] % 4 == 1, torch.nan, 0.0)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.loss(batch)
        return {"loss": losses[losses.isfinite()].mean(), **per_sample(losses)}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training_step(batch, batch_idx)


def test_a_loss_that_is_not_finite_is_nan():
    looks = looked(Infinite())
    (look, *_), table = looks.looks, looks.tracker.table
    first = TEXTS[table.first_row[look.rows], 0] % 4
    assert len(look.rows) == 40 and len(first.unique()) == 4
    assert torch.equal(look.losses.isnan(), first < 2)


class Logging(TinyLM):
    """Writes to its logger itself, and takes its batch apart."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss({"input_ids": batch.pop("input_ids")})
        self.log("val", loss, batch_size=8)
        self.logger.log_metrics({"own": float(loss.detach())}, self.global_step)
        return loss

    training_step = validation_step


@pytest.mark.parametrize("mode", ["validation_step", "training_step", "training"])
def test_nothing_reaches_the_users_loggers(mode, tmp_path):
    logged = []
    for name in ("with", "without"):
        logger = CSVLogger(tmp_path, name, flush_logs_every_n_steps=1)
        options = {
            "logger": logger,
            "log_every_n_steps": 1,
            "train": DataLoader(Rows(TEXTS), 8),
            "val_check_interval": None,
        }
        fit(watched(mode) if name == "with" else [LossTracker(families=False)], Logging(), max_epochs=2, **options)
        logged.append((tmp_path / name / "version_0" / "metrics.csv").read_text())
    assert logged[0] == logged[1]


def packed_loader(layout: str, steps: list[list[Tensor]]) -> DataLoader[Any]:
    """Of packed rows, two in a batch; or of one row with the documents of a step."""
    batches = [laid_out(layout, step) for step in steps]
    if layout != "packed":
        return DataLoader(batches, 1, collate_fn=first)  # type: ignore[arg-type]
    rows = [
        {name: values[n] for name, values in batch.items()} for batch in batches for n in range(len(batch["labels"]))
    ]
    return DataLoader(rows, 2)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*have the content of training samples")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["validation_step", "training"])
def test_documents_of_packed_rows_are_measured_by_themselves(layout, mode):
    """Of each row two documents are asked for; a row of the data set is fetched once."""
    steps = [texts(7, seed) for seed in (1, 2, 3)]
    asked = [id_of(step[place]) for step in steps for place in (0, 3)]
    tracker = LossTracker(families=False)
    tracker, looks = watched(
        mode, tracker, at="on_train_epoch_end", pick=lambda known: tracker.table.index.find(torch.tensor(asked))
    )
    model = Model(1e-2)
    run = trainer([tracker, looks], max_epochs=2, val_check_interval=1.0, precision="64-true")
    run.fit(model, packed_loader(layout, steps), packed_loader(layout, steps))
    look = looks.looks[-1]
    assert tracker.table.ids[look.rows].sort().values.tolist() == sorted(asked) and not looks.second.keeps_batches
    by_id = {id_of(text): text for step in steps for text in step}
    truth = [float(loss_of(model, by_id[id])) for id in tracker.table.ids[look.rows].tolist()]
    torch.testing.assert_close(look.losses, torch.tensor(truth))


def first(rows: list[Any]) -> Any:
    return copy.deepcopy(rows[0])


def cut(tokens: Tensor, length: int, overlong: bool = False) -> list[dict[str, Any]]:
    """Windows of each text, which the batch names; of the last text there are very many."""
    parts = [(n, part) for n, text in enumerate(tokens) for part in text.split(length)]
    parts += [(99, tokens[n % len(tokens), :length].roll(n)) for n in range(20)] if overlong else []
    return [{"input_ids": part, "sample_id": n} for n, part in parts]


named = pytest.mark.filterwarnings("ignore:.*sample ids that came again had other content")  # as it should be


@named
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_document_in_windows_has_the_loss_of_all_of_them(shuffle):
    windows = cut(TEXTS, 4)
    tracker = LossTracker(families=False)

    @torch.no_grad()
    def measured(module: Any, rows: Tensor) -> Tensor:
        mean = [module.loss({"input_ids": TEXTS[n].reshape(3, 4)}) for n in tracker.table.ids[rows].tolist()]
        return torch.stack(mean)

    train: Any = DataLoader(windows, 8, shuffle=shuffle)  # type: ignore[arg-type]
    looks = looked(TinyLM(), tracker=tracker, train=train, looks={"measured": measured})
    look = looks.looks[-1]
    assert tracker.table.ids[look.rows].sort().values.tolist() == [*range(40)]
    assert (tracker.table.rows == 3).all() and not looks.second.keeps_batches
    torch.testing.assert_close(look.losses, looks.truth[-1])


@named
def test_documents_of_more_windows_than_are_looked_for_are_left_out_and_said():
    tracker = LossTracker(families=False)
    train: Any = DataLoader(cut(TEXTS, 4, overlong=True), 8)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="could not measure 1 of 41 samples"):
        looks = looked(TinyLM(), tracker=tracker, train=train)
    assert tracker.table.ids[looks.looks[-1].rows].sort().values.tolist() == [*range(40)]
