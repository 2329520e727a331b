"""Ids without rows: hashed from content, or the user's own; and what is said where neither can be."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.hashing import content_ids
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.sample_keys import key_ids
from tests.support.loaders import LOADERS, QUIET, Model, Rows, Stream, fit, rows_of

pytestmark = QUIET


class Batches:
    """A loader that is not torch's."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Rows(), 4))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), 4),
        DataLoader(Stream(), 4, num_workers=2),
        DataLoader([default_collate([Rows()[0], Rows()[i]]) for i in range(5)], batch_size=None),
        Batches(),
    ],
    ids=["stream", "stream, 2 workers", "batch_size=None", "custom"],
)
def test_without_rows_ids_are_hashed_from_content(loader):
    watch, model, _ = fit(loader)
    assert watch.ids.sample_ids.source == "content"
    hashed = {row: content_ids(default_collate([Rows()[row]])).item() for row in range(22)}
    assert watch.taken["train"] == [[hashed[row] for row in rows] for rows in model.rows["train"]]


class CutShort(Model):
    """Leaves its epochs at their third batch, which it has seen."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if batch_idx < 2:
            return None
        self.rows["train"].append(rows_of(batch))
        return -1


@pytest.mark.parametrize("model", [Model, CutShort])
def test_rows_beside_a_stream_keep_their_ids(model):
    """A stream has no length, so Lightning fetches a step ahead, and leaves one behind when an epoch is cut short."""
    beside = CombinedLoader([DataLoader(Rows(15), 3, shuffle=True), DataLoader(Stream(), 2)], "max_size_cycle")
    watch, model, _ = fit(beside, model=model())
    assert [len(ids) for ids in watch.taken["train"]] == [len(rows) for rows in model.rows["train"]]
    assert [ids[:3] for ids in watch.taken["train"]] == [rows[:3] for rows in model.rows["train"]]


def some(samples: list[dict[str, Any]]) -> Any:
    return default_collate([sample for sample in samples if sample["row"] % 5])


def with_key(value: Callable[[Tensor], Any]) -> DataLoader:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_collate(samples)
        return batch | {"sample_id": value(batch["row"])}

    return DataLoader(Rows(), 4, shuffle=True, collate_fn=collate)


def test_a_collate_fn_that_drops_samples_is_warned_of_once_and_hashed():
    with pytest.warns(UserWarning, match="4 rows were fetched for 3 samples, so collate_fn left some out") as caught:
        watch, model, _ = fit(DataLoader(Rows(), 4, collate_fn=some))
    assert sum("collate_fn left" in str(each.message) for each in caught) == 1
    assert [len(ids) for ids in watch.taken["train"]] == [len(rows) for rows in model.rows["train"]]


def graph(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Three nodes a sample, one after the other, as graph libraries collate."""
    batch = default_collate(samples)
    return {"nodes": batch["x"].repeat_interleave(3, 0), **batch}


@pytest.mark.parametrize("identity", ["auto", "index"])
def test_a_batch_of_graphs_has_one_row_for_each_graph_whatever_its_first_tensor_is(identity):
    watch, model, _ = fit(DataLoader(Rows(), 4, shuffle=True, collate_fn=graph), ids=LoaderIds(SampleIds(identity)))
    assert watch.ids.sample_ids.source == "index"
    assert watch.taken["train"] == model.rows["train"]


@pytest.mark.parametrize(
    "value", [lambda row: row - 9, lambda row: (row - 9)[:, None].int(), lambda row: (row - 9).tolist()]
)
@pytest.mark.parametrize("identity", ["auto", "key"])
def test_ids_of_the_users_own_win(value, identity):
    watch, model, _ = fit(with_key(value), ids=LoaderIds(SampleIds(identity)))
    assert watch.taken["train"] == [[row - 9 for row in rows] for rows in model.rows["train"]]
    assert watch.ids.sample_ids.source == "key"


def test_keys_that_are_no_integers_have_a_lasting_number():
    assert SampleIds("key", key="url").of({"url": ["a", "b", "a"]}, None).tolist() == list(key_ids("aba"))
    assert list(key_ids(["a", (0, 1), 2**63, -3])) == [
        -1586550463278054497,
        -410956273188943891,
        -4436916390290898806,
        -3,
    ]


MESSAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "typo": (lambda: SampleIds("indx"), "knows no identity='indx'. Did you mean 'index'?"),
    "no such": (lambda: SampleIds("zzz"), "knows no identity='zzz'. Choose one of 'auto', 'index', 'content', 'key'."),
    "missing key": (
        lambda: fit(LOADERS["plain"](), ids=LoaderIds(SampleIds("key", key="doc"))),
        "reads batch['doc'], but the batch is a dict with keys 'x', 'row'. Let the data set return 'doc'",
    ),
    "no mapping": (lambda: SampleIds("key").of([1], None), "but the batch is a list with no keys"),
    "float": (lambda: fit(with_key(lambda row: row / 2)), "but found torch.float32. Return them as torch.int64."),
    "count": (lambda: fit(with_key(lambda row: row[:3])), "holds 3 ids for 4 samples. Return one 'sample_id'"),
    "stream": (
        lambda: fit(DataLoader(Stream(), 4), ids=LoaderIds(SampleIds("index"))),
        "but got a DataLoader over Stream. Use identity='content', or put batch['sample_id'] into the batch",
    ),
    "dropped": (
        lambda: fit(DataLoader(Rows(), 4, collate_fn=some), ids=LoaderIds(SampleIds("index"))),
        "but 4 rows were fetched for 3 samples. Use identity='content'",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_say_what_was_found_and_what_to_type(name):
    cause, message = MESSAGES[name]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        cause()
    assert message in str(caught.value)


GOLDEN = "content_ids({'input_ids': torch.arange(6).reshape(2, 3)}).tolist()"
GOLDEN_IDS = [-2996378304754610916, 4910647245183538961]
GOLDEN_FLOAT_IDS = [-5172845970173981429, -6483892578880606493]
GOLDEN_FLOATS = "content_ids(torch.arange(6.0).reshape(2, 3)).tolist()"


def test_an_id_is_the_same_number_in_every_process():
    code = f"import torch; from lightning_memsink.samples.hashing import content_ids; print({GOLDEN} + {GOLDEN_FLOATS})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(GOLDEN_IDS + GOLDEN_FLOAT_IDS)


def padded(rows: list[list[int]], width: int, left: bool, fill: int) -> dict[str, Tensor]:
    blank = [[fill] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, blank, strict=True)]
    mask = [[n < width - len(row) if left else n < len(row) for n in range(width)] for row in rows]
    mask = [[kept != left for kept in row] for row in mask]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("width", [5, 6, 40])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("fill", [0, 7, -100])
def test_padding_and_neighbours_do_not_change_the_id_of_a_text(width, left, fill):
    rows = [[7, 0, 7, 3, 0], [7], [0], [0, 0], [1, 2], [2, 1], [], [7, 0, 7, 3, 0]]
    ids = content_ids(padded(rows, width, left, fill)).tolist()
    assert ids[0] == ids[-1] and len(set(ids)) == len(rows) - 1
    for row, number in zip(rows[:6], ids[:6], strict=True):
        assert content_ids({"input_ids": torch.tensor([row]), "labels": torch.ones(1)}).item() == number
        assert content_ids((torch.tensor([row]), torch.ones(1))).item() == number


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "copied": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first to last": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "a slice at an odd offset": lambda x: torch.cat([x[:1], x])[1:],
    "every other": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "with gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_and_threads_do_not_change_an_id(layout, dtype):
    batch = (torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0)) * 2).floor().to(dtype)
    alone = torch.cat([content_ids(batch[i : i + 1]) for i in range(6)])
    assert len(alone.unique()) == 6
    assert torch.equal(content_ids(LAYOUTS[layout](batch)), alone)


def test_zero_has_no_sign():
    assert torch.equal(content_ids(torch.tensor([[-0.0, 1.0]])), content_ids(torch.tensor([[0.0, 1.0]])))


def test_every_tensor_of_a_sample_counts():
    image, label = torch.rand(3, 4), torch.tensor([0, 1, 2])
    base = content_ids({"image": image, "label": label, "temperature": torch.tensor(1.0)})
    assert torch.equal(base, content_ids({"image": image, "label": label, "temperature": torch.tensor(2.0)}))
    assert torch.equal(base == content_ids({"image": image, "label": torch.tensor([0, 1, 1])}), label < 2)


ROWS = 100_000
CROWDS: dict[str, Callable[[], Tensor]] = {
    "random text": lambda: torch.randint(0, 50_000, (ROWS, 8)),
    "counting text": lambda: torch.arange(ROWS)[:, None] // torch.tensor([1, 10, 100, 1000]) % 10 + torch.arange(4),
    "two letters": lambda: (torch.arange(ROWS)[:, None] >> torch.arange(17)) & 1,
    "signs": lambda: 1.0 - 2.0 * ((torch.arange(ROWS)[:, None] >> torch.arange(18)) & 1),
    "random images": lambda: torch.rand(ROWS, 1, 3, 3),
    "bytes": lambda: torch.randint(0, 256, (ROWS, 2, 8), dtype=torch.uint8),
    "high bits": lambda: (((torch.arange(ROWS)[:, None] >> torch.arange(17)) & 1) << 63)[:, :, None],
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_different_samples_have_different_ids(crowd):
    torch.manual_seed(0)
    rows = CROWDS[crowd]()
    different = len(rows.flatten(1).unique(dim=0))
    assert len(content_ids(rows).unique()) == different


def test_ids_use_all_their_bits():
    torch.manual_seed(0)
    ids = content_ids(torch.randint(0, 100, (20_000, 4)))
    share = ((ids[:, None] >> torch.arange(64)) & 1).double().mean(0)
    assert (share - 0.5).abs().max() < 0.02


def test_a_batch_without_tensors_has_no_content():
    assert SampleIds("content").of(["a", "b"], None) is None
    with pytest.raises(ValueError, match="tensors in it, one row a sample, but found a list with no tensors"):
        content_ids(["a", "b"])
