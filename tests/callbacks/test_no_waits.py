"""Between looks and evaluations no callback makes the host wait for the device, counted on a pretend one."""

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_memsink import Goldfish, Ledger, MemSinks, SampleGradientMask, SinkDropout, memsink
from lightning_memsink.callbacks.runtime.host_batches import FIRST, HostBatches
from lightning_memsink.callbacks.runtime.host_copies import MOST, HostCopies
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.losses.step_reader import EVERY as WATCHED
from tests.support.pretend_device import DEVICE, Counts, pretend_device, to_device
from tests.support.small_runs import trainer

VOCABULARY, WIDTH, LENGTH, BATCH = 61, 16, 12, 4
SETTLED, STEPS, EVERY = 10, 60, 20
"""First steps, in which batches are compared and followed to learn whose losses are whose; all steps; steps between two
evaluations."""
LOOK = 8
"""Steps between two looks of the localizer."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden):
        return self.down(self.act(self.up(hidden)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Mlp()

    def forward(self, hidden):
        query, key, value = self.qkv(self.first(hidden)).split(WIDTH, -1)
        scores = query @ key.transpose(1, 2) / math.sqrt(WIDTH)
        hidden = hidden + self.out(scores.softmax(-1) @ value)
        return hidden + self.mlp(self.second(hidden))


class Model(LightningModule):
    """A transformer on the pretend device, or on the CPU."""

    def __init__(self, is_pretend: bool = True, hook=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.is_pretend, self.hook = is_pretend, hook
        if is_pretend:
            to_device(self)

    def to(self, *args, **kwargs):
        return self

    @property
    def device(self):
        return DEVICE if self.is_pretend else torch.device("cpu")

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        moved = to_device(batch) if self.is_pretend else {name: part.clone() for name, part in batch.items()}
        return moved if self.hook is None else self.hook(moved)

    def training_step(self, batch, batch_idx):
        hidden = self.embedding(batch["input_ids"])
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))[:, :-1]
        return cross_entropy(logits.reshape(-1, VOCABULARY), batch["input_ids"][:, 1:].reshape(-1))

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, foreach=False)


class Phases(Callback):
    """Must be the first callback."""

    def __init__(self, counts: Counts, looks: bool) -> None:
        self.counts, self.looks = counts, looks

    def enter(self, phase: str) -> None:
        self.counts.phase = phase

    def on_train_batch_start(self, trainer, *args):
        step = trainer.global_step
        kind = "look" if self.looks and step % LOOK == 0 else "watched step" if step % WATCHED == 0 else "step"
        self.enter("start" if step < SETTLED else kind)

    def on_validation_start(self, *args):
        self.enter("evaluation")

    def on_validation_batch_start(self, *args):
        self.enter("validation batch")

    def on_validation_epoch_end(self, *args):
        self.enter("evaluation")

    def on_train_epoch_end(self, *args):
        self.enter("epoch")

    def on_train_end(self, *args):
        self.enter("end")


def row(name: str, counts: Counts) -> str:
    """Of the table in BENCHMARKS.md: waits in all phases together."""
    waits = [
        sum(counts.of(phase, "wait").values()) for phase in ("start", "step", "watched step", "look", "evaluation")
    ]
    return f"| {name} | {' | '.join(map(str, waits))} |"


def rows(count: int, seed: int, with_keys: bool = False):
    ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(LENGTH, dtype=torch.int64)
    keys = [{"sample_id": torch.tensor(n)} if with_keys else {} for n in range(count)]
    return [{"input_ids": row, "attention_mask": mask, **key} for row, key in zip(ids, keys, strict=True)]


def fitted(
    callbacks, counts: Counts | None = None, with_keys: bool = False, workers: int = 0, hook=None, looks: bool = False
) -> Trainer:
    phases = [] if counts is None else [Phases(counts, looks)]
    options = {"max_epochs": None, "max_steps": STEPS, "val_check_interval": EVERY, "check_val_every_n_epoch": None}
    run = trainer([*phases, *callbacks], num_sanity_val_steps=0, **options)
    loader = DataLoader(
        rows(4 * STEPS // 3, 0, with_keys), BATCH, num_workers=workers, persistent_workers=bool(workers)
    )
    run.fit(Model(counts is not None, hook), loader, DataLoader(rows(64, 1, with_keys), 8))
    return run


def watched(*mitigations, **options):
    return memsink(*mitigations, path=None, **options)


LAYER = "blocks.0.mlp.down"
SINKS = Sinks({LAYER: torch.arange(6)}, {LAYER: torch.ones(6)}, {LAYER: 4 * WIDTH})

SETS = {
    "watch": lambda: watched(),
    "content": lambda: watched(identity="content"),
    "index": lambda: watched(identity="index"),
    "key": lambda: watched(),
    "hold": lambda: watched(SampleGradientMask()),
    "skip": lambda: watched(SampleGradientMask("skip")),
    "units": lambda: watched(localize=True, norms=False, every=LOOK),
    "units and norms": lambda: watched(localize=True, every=LOOK),
    "goldfish": lambda: watched(Goldfish(context=3)),
    "goldfish alone": lambda: [Goldfish(context=3)],
    "memsinks": lambda: watched(MemSinks(certify=0)),
    "dropout": lambda: watched(SinkDropout(sinks=SINKS, who="all")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETS)
def test_no_step_waits(name):
    with pretend_device() as counts:
        fitted(SETS[name](), counts, with_keys=name == "key", looks=name.startswith("units"))
    print(row(name, counts))
    assert not counts.of("step", "wait"), counts.of("step", "wait")
    assert not [lines for _, kind, lines in counts.found if kind == "mismatch"]
    assert sum(counts.of("watched step", "wait").values()) <= 3, counts.of("watched step", "wait")
    assert sum(counts.of("look", "wait").values()) <= 4 * len(range(16, STEPS, LOOK)), counts.of("look", "wait")


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_waits_a_few_times():
    with pretend_device() as counts:
        fitted(watched(), counts)
    evaluations = STEPS // EVERY
    assert sum(counts.of("evaluation", "wait").values()) <= 20 * evaluations
    assert sum(counts.of("validation batch", "wait").values()) <= 3 * FIRST, "only while batches are compared at once"


def recorded(trainer: Trainer) -> dict:
    table, controls = Ledger.of(trainer).losses, Ledger.of(trainer).controls
    columns = {name: getattr(table, name) for name in table.columns}
    return {**columns, "controls": controls.latest, "control ids": controls.ids}


def shuffled(batch):
    return {name: part.flip(0) for name, part in batch.items()}


def masked(batch):
    return {**batch, "input_ids": torch.where(batch["input_ids"] % 7 == 0, 1, batch["input_ids"])}


class Late:
    """A hook that changes batches only after those that are compared at once."""

    def __init__(self, change) -> None:
        self.change, self.count = change, 0

    def __call__(self, batch):
        self.count += 1
        return batch if self.count <= 3 * FIRST else self.change(batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("identity", ["content", "index", "key"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", [None, shuffled, masked])
def test_the_ledger_is_that_of_a_run_without_a_device(identity, workers, hook):
    with_keys = identity == "key"
    plain = recorded(fitted(watched(identity=identity), None, with_keys, workers, hook))
    with pretend_device() as counts:
        got = recorded(fitted(watched(identity=identity), counts, with_keys, workers, hook))
    assert got.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(got[name]).nan_to_num(-1), torch.as_tensor(value).nan_to_num(-1)), name


@pytest.mark.parametrize("identity", ["content", "index", "key"])
def test_batches_that_a_hook_begins_to_change_are_left_out_and_then_read_on_the_device(identity):
    with_keys = identity == "key"
    options = {"identity": identity, "recheck": 0, "flush_every": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningModule, "log", lambda *_, **__: None)
        plain = recorded(fitted(watched(**options), None, with_keys, hook=Late(shuffled)))
        with (
            pretend_device() as counts,
            pytest.warns(UserWarning, match="changed batches between the loader and the step"),
        ):
            got = recorded(fitted(watched(**options), counts, with_keys, hook=Late(shuffled)))
    assert (got["exposures"] <= plain["exposures"]).all()
    lacking = int((plain["exposures"] - got["exposures"]).sum())
    assert 0 < lacking <= 2 * 5 * BATCH
    same = got["exposures"] == plain["exposures"]
    assert torch.equal(got["last_loss"][same], plain["last_loss"][same])


def test_few_values_wait_on_a_device_and_all_come_in_order():
    found = []
    with pretend_device() as counts:
        copies = HostCopies()
        for n in range(300):
            copies.put(lambda value, none: found.append(int(value)), to_device(torch.tensor([n])), None)
            assert len(copies) <= 2 * MOST + 1
        assert found == list(range(len(found))) and len(found) > 100
        copies.put(lambda: found.append(300))
        copies.drain()
    assert found == list(range(301)) and not len(copies)
    assert not [lines for _, kind, lines in counts.found if kind == "mismatch"]


def test_a_batch_that_can_not_be_compared_is_read_on_the_device():
    with pretend_device():
        hosts = HostBatches()
        host = {"input_ids": torch.ones(2, 3).to_sparse()}
        assert hosts.compare({"input_ids": to_device(torch.ones(2, 3))}, host) is False
        whole = {"input_ids": torch.ones(2, 3)}
        assert hosts.of(to_device(whole), whole) is None
