"""What a run meets in the wild: a clear error at the start or one warning, and training goes on."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import (
    CANARIES,
    CONTROLS,
    TRAIN,
    Rows,
    TinyLM,
    chain,
    control_loader,
    fit,
    noise,
    train_loader,
    watch,
)


class Sabotaged(TinyLM):
    """Its third step has a loss that is no number; the optimizer is spared, as a careful user would."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss * torch.tensor(self.bad) if self.global_step == 2 else loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0, 0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_costs_one_visit(bad):
    run, _ = fit(watch(), Sabotaged(bad), max_epochs=2)
    table = Ledger.of(run).losses
    assert torch.isfinite(table.last_loss).all()
    assert int(table.exposures.sum()) == 2 * len(TRAIN)


def test_a_model_gone_to_nan_is_undecided_not_memorized():
    class Diverged(TinyLM):
        def loss(self, batch):
            return super().loss(batch) * float("nan")

    with pytest.warns(UserWarning, match="0 controls with a finite loss, and 16 are needed"):
        run, _ = fit(watch(), Diverged())
    counts = Ledger.of(run).flags.counts()
    assert counts["memorized"] == counts["learned"] == counts["hard"] == 0
    assert counts["undecided"] > 0.9 * sum(counts.values())  # the first batch had a loss, once: it stays unseen


def test_controls_with_infinite_losses_are_left_out():
    class Odd(TinyLM):
        def validation_step(self, batch, batch_idx):
            loss = self.loss(batch)
            return loss if batch_idx else loss * float("inf")

    run, _ = fit(watch(), Odd())
    assert Ledger.of(run).flags.evaluations[-1].held_out in (len(CONTROLS), len(CONTROLS) - 40)


@pytest.mark.filterwarnings(
    "ignore:.*have the content of training samples",  # texts are cut to six tokens, and one comes twice
    "ignore:.*could not measure",  # the text of a row depends on its batch
)
def test_empty_and_ragged_batches_pass():
    """A collate function that pads to the longest of the batch, and one that leaves everything out."""

    def collate(rows):
        if len(rows) == 16 and int(rows[0]["input_ids"][0]) % 7 == 0:
            return {"input_ids": torch.zeros(0, 12, dtype=torch.int64)}
        lengths = [6 + int(row["input_ids"][0]) % 7 for row in rows]
        width = max(lengths)
        tokens = torch.stack(
            [F.pad(row["input_ids"][:n], (0, width - n)) for row, n in zip(rows, lengths, strict=True)]
        )
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        return {"input_ids": tokens, "attention_mask": mask.long()}

    class Masked(TinyLM):
        def loss(self, batch):
            tokens = batch["input_ids"]
            if not len(tokens):
                return self.embed.weight.sum() * 0
            logits = self.logits(tokens)
            targets = tokens[:, 2:].masked_fill(batch["attention_mask"][:, 2:] == 0, -100)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    run, _ = fit(
        watch(),
        Masked(),
        train=train_loader(collate_fn=collate),
        controls=DataLoader(Rows(CONTROLS), 40, collate_fn=collate),
    )
    ledger = Ledger.of(run)
    assert torch.isfinite(ledger.losses.last_loss).all() and len(ledger.losses) > 150
    assert set(ledger.losses.elements.tolist()) <= set(range(4, 11))  # the model predicts from the third token on


def test_a_sequence_without_a_counted_token_has_no_loss_and_no_verdict():
    class Ignoring(TinyLM):
        def loss(self, batch):
            tokens = batch["input_ids"]
            logits = self.logits(tokens)
            targets = tokens[:, 2:].masked_fill((tokens == CANARY).all(1, keepdim=True), -100)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    CANARY = TRAIN[-1]
    run, _ = fit(watch(), Ignoring())
    ledger = Ledger.of(run)
    row = ledger.losses.index.find(content_ids({"input_ids": CANARY[None]}))
    assert Verdict(int(ledger.flags.verdict[row])).reason == "no finite loss"
    assert int(torch.isnan(ledger.losses.last_loss).sum()) == 1


class Keyed(Rows):
    """Ids of the user's own: the row divided by two, and negative."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "sample_id": -(index // 2)}


@pytest.mark.filterwarnings("ignore:.*had other content", "ignore:.*come under several ids")
def test_texts_that_share_an_id_are_windows_of_one_document_whatever_the_id():
    loader = DataLoader(Keyed(TRAIN), 16, shuffle=True)
    run, _ = fit([LossTracker(), MemorizationDetector()], train=loader, controls=DataLoader(Keyed(CONTROLS), 40))
    table = Ledger.of(run).losses
    assert sorted(table.ids.tolist()) == sorted({-(row // 2) for row in range(len(TRAIN))})
    assert set(table.exposures.tolist()) == {3}


def test_missing_ids_are_an_error_at_the_first_batch():
    with pytest.raises(
        RuntimeError, match=r"reads batch\['sample_id'\], but the batch is a dict with keys 'input_ids'"
    ):
        fit([LossTracker(identity="key"), MemorizationDetector()])


def test_an_unknown_identity_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"knows no identity='contents'. Did you mean 'content'\?"):
        LossTracker(identity="contents")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_without_a_validation_set_first_visits_are_the_controls():
    run, _ = fit(
        [LossTracker(identity="content", control_every=7), MemorizationDetector()], controls="none", max_epochs=2
    )
    ledger = Ledger.of(run)
    last = ledger.flags.evaluations[-1]
    assert len(ledger.losses) == 204
    assert (last.held_out, last.step) == (0, run.global_step) and last.first_visits >= 100
    assert not ledger.flags.memorized.any()
    # No other random string came later than these: there is nothing like them to compare with.
    assert set(ledger.flags.verdict[canary_rows(ledger)].tolist()) == {Verdict.NO_MATCHED_CONTROLS}


@pytest.mark.parametrize("many", [1, 7])
def test_too_few_held_out_controls_leave_verdicts_to_first_visits(many):
    run, _ = fit(watch(), controls=control_loader(CONTROLS[:many]))
    last = Ledger.of(run).flags.evaluations[-1]
    assert last.held_out == 0 and last.first_visits > 50


def test_too_few_controls_of_any_kind_support_no_verdict_and_are_counted():
    """A tracker that joins a run does not know who was trained on before."""
    tracker, detector = LossTracker(), MemorizationDetector()
    with pytest.warns(UserWarning, match="7 controls with a finite loss, and 16 are needed|support no verdict"):
        tracker.table.begins_with_training = False
        run, _ = fit([tracker, detector], controls=control_loader(CONTROLS[:7]))
    reasons = {Verdict(code).reason for code in Ledger.of(run).flags.verdict.tolist()}
    assert reasons == {"too few controls"}


def test_with_controls_of_another_kind_first_visits_find_what_is_memorized():
    """Trained on text with canaries; held-out samples are constant sequences, with which nothing is matched."""
    other = torch.arange(32)[:, None].repeat(3, 12)
    other[:, 0] = torch.arange(96) // 3 % 32
    run, _ = fit(watch(), controls=control_loader(other), max_epochs=2)  # later the rest is known by heart, too
    ledger = Ledger.of(run)
    assert set(memorized_rows(ledger)) <= set(canary_rows(ledger))
    assert ledger.flags.evaluations[-1].by_first_visits > 0.5


def memorized_rows(ledger):
    return ledger.flags.memorized.nonzero().flatten().tolist()


def canary_rows(ledger):
    return ledger.losses.index.find(content_ids({"input_ids": CANARIES})).tolist()


class OneClass(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_one_class_is_learned_and_nothing_is_memorized():
    """Inputs that are no tokens, labels all alike: matched on the early loss alone."""
    inputs = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, torch.zeros(120, dtype=torch.int64))
    train, held_out = torch.utils.data.random_split(data, [80, 40], torch.Generator().manual_seed(1))
    run, _ = fit(
        [LossTracker(), MemorizationDetector()], OneClass(), max_epochs=5, val_check_interval=1.0,
        train=DataLoader(train, 8, shuffle=True), controls=DataLoader(held_out, 20),
    )  # fmt: skip
    counts = Ledger.of(run).flags.counts()
    assert counts["memorized"] == 0 and counts["learned"] + counts["hard"] >= 76


def test_a_data_set_that_changed_before_a_resume_is_noticed(tmp_path):
    def crew():
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [LossTracker(identity="index"), MemorizationDetector(), keep]

    warnings.filterwarnings("ignore", ".*come under several ids")
    fit(crew(), max_epochs=1, enable_checkpointing=True)
    again = {"max_epochs": 2, "ckpt_path": str(tmp_path / "epoch=0.ckpt"), "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", ".*LeafSpec|.*many workers|.*logging interval|.*Checkpoint directory|.*come under"
        )
        fit(crew(), **again)
    with pytest.warns(UserWarning, match=r"The data set changed since the checkpoint: the same sample ids now name"):
        fit(crew(), **again, train=train_loader(torch.cat([chain(100, seed=7), noise(228, seed=8)])))


def test_a_ledger_of_an_older_version_is_refused_at_the_start(tmp_path):
    path = tmp_path / "old.ckpt"
    run, _ = fit(watch(), max_epochs=1)
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["LossTracker"]["table"]["schema"] = 0
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"holds a memsink ledger of schema 0; this version reads schema 1"):
        fit(watch(), max_epochs=2, ckpt_path=str(path))


def test_a_loss_that_cannot_be_split_is_said_once_and_training_goes_on():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return 4 * grad * ctx.saved_tensors[0]

    class Custom(TinyLM):
        def loss(self, batch):
            return Fused.apply(self.embed(batch["input_ids"]))

    with pytest.warns(UserWarning) as caught:
        run, _ = fit(watch(), Custom())
    texts = [str(warning.message) for warning in caught if "Custom.training_step" in str(warning.message)]
    assert len(texts) == 1 and "End Custom.training_step with `return per_sample(losses, ids)`" in texts[0]
    assert run.global_step == 63


def test_a_message_that_counts_the_batch_is_said_once_whatever_its_size():
    """A function of the user's that returns another number of losses in every batch."""

    def of_some(batch, outputs):
        tokens = batch["input_ids"]
        return torch.zeros(int((tokens % 3 == 0).sum()))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([LossTracker(identity="content", loss=of_some)], controls="none", max_epochs=1)
    messages = [str(warning.message) for warning in caught if "of_some" in str(warning.message)]
    assert len(messages) == 1 and "Return one loss per sample, [B]" in messages[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": [], "control_fraction": 0.1}, r"takes controls=loader or control_fraction=share, not both"),
        ({"control_fraction": 1.5}, r"share of the training set between 0 and 1, but it is 1.5"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossTracker(**options)
