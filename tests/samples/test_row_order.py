"""Rows that a hook reorders between the loader and the step: the ids follow them, or there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_memsink.samples.row_order import RowPrints
from tests.support.coded_rows import CodedRows, Idle, coded, fit_checked, loader_of, text
from tests.support.loaders import QUIET

pytestmark = QUIET

ROWS, B = 24, 6
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def image(row: int) -> dict[str, Any]:
    return {"x": coded(row, 3, 4, 4).float(), "label": row % 3}


def grey(row: int) -> dict[str, Any]:
    """Without a label."""
    return {"x": torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(row))}


def shuffled(batch: Any, order: Tensor) -> Any:
    return {name: part[order] for name, part in batch.items()}


class Hooked(Idle):
    """Gives the batch to ``change`` in one of Lightning's hooks, and records the rows that its steps see."""

    def __init__(self, change: Any, hook: str = "on_after_batch_transfer") -> None:
        super().__init__()
        self.change, self.seen = change, []
        self.generator = torch.Generator().manual_seed(5)
        setattr(self, hook, self._changed)

    def _changed(self, batch: Any, *_: Any) -> Any:
        return self.change(batch, torch.randperm(len(batch["x"]), generator=self.generator))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            self.seen.append((batch["x"].reshape(len(batch["x"]), -1)[:, 0] // 1000 - 1).long().tolist())
        return super().training_step(batch, batch_idx)


def taken(change: Any, make: Any = image, hook: str = "on_after_batch_transfer", **options: Any) -> tuple[Any, Any]:
    model = Hooked(change, hook)
    watch = fit_checked(loader_of(make, None, B, options.pop("workers", 0), shuffle=True, count=ROWS), model, **options)
    return watch.taken["train"], model.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", HOOKS)
def test_ids_follow_rows_that_a_hook_shuffles(hook, workers):
    ids, seen = taken(shuffled, hook=hook, workers=workers)
    assert ids == seen and len(ids) == 2 * ROWS // B


def test_ids_follow_rows_that_another_callback_shuffles_in_place():
    class Shuffle(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch.update(shuffled(batch, torch.arange(B).flip(0)))

    model = Hooked(lambda batch, _: batch)
    before = fit_checked(loader_of(image, None, B, shuffle=True), model, max_epochs=1, first=[Shuffle()])
    assert before.taken["train"] == model.seen


def test_ids_follow_rows_that_are_overwritten_in_place():
    def overwrite(batch: Any, order: Tensor) -> Any:
        for part in batch.values():
            part.copy_(part[order].clone())
        return batch

    ids, seen = taken(overwrite)
    assert ids == seen


def test_ids_follow_rows_that_change_type_and_place():
    class Small(Hooked):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch["x"][:, 0].long().tolist())
            return Idle.training_step(self, batch, batch_idx)

    def change(batch: Any, order: Tensor) -> Any:
        return {"extra": torch.zeros(B), "x": batch["x"][order].bfloat16(), "label": batch["label"][order]}

    model = Small(change)
    loader = loader_of(lambda row: {"x": torch.tensor([row, 0.3]), "label": row % 3}, None, B, shuffle=True)
    assert fit_checked(loader, model).taken["train"] == model.seen


def test_ids_follow_a_part_of_the_rows():
    ids, seen = taken(lambda batch, order: shuffled(batch, order[:4]))
    assert ids == seen and {len(some) for some in ids} == {4}


def test_texts_in_lists_are_followed():
    class Listed(Hooked):
        def _changed(self, batch: Any, *_: Any) -> Any:
            return [batch[n] for n in torch.randperm(len(batch), generator=self.generator).tolist()]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append([int(sample["x"][0]) // 1000 - 1 for sample in batch])
            return Idle.training_step(self, batch, batch_idx)

    model = Listed(None)
    watch = fit_checked(loader_of(text, list, B, shuffle=True), model)
    assert watch.taken["train"] == model.seen


def noise(like: Tensor) -> Tensor:
    """Of a generator of its own: a hook that draws from torch's would also change the sampler's order."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(int(like.abs().sum()) % 1000))


KEPT: dict[str, tuple[Any, Any]] = {
    "untouched": (image, lambda batch, _: batch),
    "copied": (image, lambda batch, _: {name: part.clone() for name, part in batch.items()}),
    "augmented, labels kept": (image, lambda batch, _: {**batch, "x": noise(batch["x"])}),
    "normalized": (grey, lambda batch, _: {"x": (batch["x"] - 3.0) / 7.0}),
    "noisy": (grey, lambda batch, _: {"x": batch["x"] + 0.1 * noise(batch["x"])}),
    "some flipped": (grey, lambda batch, _: {"x": torch.cat([batch["x"][:3].flip(-1), batch["x"][3:]])}),
    "one more tensor": (image, lambda batch, order: {"noise": noise(batch["x"]), **batch}),
    "another order of names": (image, lambda batch, _: {"label": batch["label"], "x": batch["x"].clone()}),
}


@pytest.mark.parametrize("name", KEPT)
def test_rows_that_are_changed_in_their_places_keep_their_ids(name):
    make, change = KEPT[name]
    ids, _ = taken(change, make)
    plain, _ = taken(lambda batch, _: batch, make)
    assert ids == plain and None not in ids


REFUSED: dict[str, tuple[Any, Any]] = {
    "all is new": (grey, lambda batch, _: {"x": noise(batch["x"])}),
    "shuffled and augmented": (
        image,
        lambda batch, order: {"x": noise(batch["x"]), "label": batch["label"].roll(1)},
    ),
    "two views": (grey, lambda batch, _: {"x": torch.cat([batch["x"], torch.randn_like(batch["x"])])}),
    "halves that disagree": (
        lambda row: {"x": coded(row, 4), "y": coded(row, 5)},
        lambda batch, order: {"x": batch["x"], "y": batch["y"].roll(1, 0)},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_nothing_shows_have_no_ids_and_one_line_says_so(name):
    make, change = REFUSED[name]
    with pytest.warns(UserWarning, match=r"nothing shows any more which sample.*Put batch\['sample_id'\]") as caught:
        ids, _ = taken(change, make)
    assert set(map(str, ids)) == {"None"}
    assert sum("nothing shows any more" in str(each.message) for each in caught) == 1


def test_own_ids_are_shuffled_with_the_rest():
    ids, seen = taken(shuffled, lambda row: {**image(row), "sample_id": row})
    assert ids == seen


def test_two_loaders_are_followed_each_by_itself():
    class Both(Idle):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[int]] = []

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [{"x": part["x"].flip(0)} for part in batch]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append([int(value) // 1000 - 1 for part in batch for value in part["x"][:, 0]])
            return super().training_step(batch, batch_idx)

    loaders = [DataLoader(CodedRows(lambda row: {"x": coded(row, 4)}, 12), size, shuffle=True) for size in (3, 2)]
    model = Both()
    watch = fit_checked(CombinedLoader(loaders, "min_size"), model, has_rows=False)
    assert [[id % (1 << 48) for id in ids] for ids in watch.taken["train"]] == model.seen


def test_rows_are_compared_in_the_first_steps_and_then_now_and_then(monkeypatch):
    """On a device comparing waits. Once rows were found in another order, every step is compared."""
    compared = []
    inner = RowPrints.order_in
    monkeypatch.setattr(RowPrints, "order_in", lambda self, *args: compared.append(1) or inner(self, *args))
    loader = loader_of(image, None, 2, count=200)
    watch = fit_checked(loader, Hooked(lambda batch, _: {n: part.clone() for n, part in batch.items()}), max_epochs=1)
    assert len(watch.taken["train"]) == 100 and len(compared) == 9
    compared.clear()
    ids, seen = taken(shuffled)
    assert ids == seen and len(compared) == len(ids)


def test_a_hook_that_begins_to_shuffle_later_costs_the_batches_without_prints():
    def late(batch: Any, order: Tensor) -> Any:
        late.calls += 1  # type: ignore[attr-defined]
        return shuffled(batch, order) if late.calls > 15 else batch  # type: ignore[attr-defined]

    late.calls = 0  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="nothing shows any more which sample"):
        ids, seen = taken(late, max_epochs=8)
    assert ids[:15] == seen[:15] and ids[15] is None and ids[17:] == seen[17:] and ids[16] in (None, seen[16])


def test_prints_are_small():
    prints = RowPrints.of({"x": torch.randn(4, 3, 224, 224), "y": torch.arange(4)}, 4, None)
    assert prints is not None
    assert sum(column.kept.numel() for column in prints._columns) <= 4 * (64 * 3 + 1)
