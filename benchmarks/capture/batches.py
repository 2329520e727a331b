"""Cases: kinds of batches, each with an ordinary loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding

from benchmarks.capture.case import BATCH, Data, Fitted, cases, family
from benchmarks.capture.classes import cross_entropy
from benchmarks.capture.data import IGNORED, C, D, H, mlp, numbers, split, tagger, tokens, vectors
from benchmarks.capture.sequences import flat

COUNT = 5 * BATCH


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor


def joined(samples: list[Any]) -> tuple[Tensor, Tensor]:
    x, y = zip(*samples, strict=True)
    return torch.stack(x), torch.stack(y)


def collated(make: Any) -> Any:
    """The samples of `vectors`, their batches made by ``make(x, y)``."""

    def data() -> Data:
        samples = [*vectors().samples, *vectors().held_out]
        return split(samples, collate=lambda batch: make(*joined(batch)))

    return data


def by_name(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def by_attribute(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y)


def nested(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]["x"]), batch["targets"][0])


def with_strings(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"name": [f"sample {row}" for row in range(len(x))], "x": x, "y": y}


def with_scalars(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"temperature": torch.tensor(2.0), "epoch": 3, "x": x, "y": y}


def with_constants(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Constants first, with another number of rows."""
    return {"prototypes": torch.ones(C, D), "x": x, "y": y}


# Lists of samples ---------------------------------------------------------------------------------------------


def images_of_sizes() -> list[Any]:
    """``(image [3, h, w], target)``, each of its own size."""
    generator, samples = numbers(), []
    for row in range(COUNT):
        image = torch.randn(3, 4 + row % 3, 5, generator=generator)
        samples.append((image, {"y": torch.randint(C, (1 + row % 2,), generator=generator)}))
    return samples


def lists_of(collate: Any) -> Any:
    return lambda: split(images_of_sizes(), collate=collate)


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, H, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(H, C)
    )


def each_image(model: Any, images: Sequence[Tensor], targets: Sequence[Any]) -> Tensor:
    losses = []
    for image, target in zip(images, targets, strict=True):
        logits = model(image[None]).expand(len(target["y"]), -1)
        losses.append(F.cross_entropy(logits, target["y"]))
    return torch.stack(losses).mean()


def of_samples(model: Any, batch: Any) -> Tensor:
    return each_image(model, [image for image, _ in batch], [target for _, target in batch])


def of_lists(model: Any, batch: Any) -> Tensor:
    return each_image(model, *batch)


def of_dicts(model: Any, batch: Any) -> Tensor:
    return each_image(model, [sample["image"] for sample in batch], batch)


# Ragged, packed, graphs ----------------------------------------------------------------------------------------


def ragged_samples() -> list[Any]:
    generator = numbers()
    lengths = [2 + row % 4 for row in range(COUNT)]
    return [tuple(torch.randint(C, (length,), generator=generator) for _ in range(2)) for length in lengths]


def padded(samples: list[Any]) -> dict[str, Tensor]:
    """Padded along the first axis: ``[T, B]``."""
    x, y = zip(*samples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return {"x": pad(list(x)), "y": pad(list(y), padding_value=IGNORED)}


def concatenated(samples: list[Any]) -> dict[str, Tensor]:
    """All tokens of all samples in a row, and where each sample ends."""
    x, y = (torch.cat(part) for part in zip(*samples, strict=True))
    return {"x": x, "y": y, "lengths": torch.tensor([len(sample[0]) for sample in samples])}


def tokens_of_padded(batch: Any) -> Tensor:
    count = (batch["y"] != IGNORED).sum(0).double()
    return count / count.sum()


def graph(samples: list[Any]) -> dict[str, Tensor]:
    """Nodes of all graphs, the graph of each, and a class for each graph."""
    x, y = zip(*samples, strict=True)
    return {
        "x": torch.cat(x),
        "batch": torch.arange(len(x)).repeat_interleave(torch.tensor([len(one) for one in x])),
        "y": torch.stack([one[0] for one in y]),
    }


def graph_loss(model: Any, batch: Any) -> Tensor:
    nodes = model(batch["x"])
    graphs = nodes.new_zeros(len(batch["y"]), C).index_add(0, batch["batch"], nodes)
    return F.cross_entropy(graphs, batch["y"])


def packed_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def packed(samples: list[Any]) -> Any:
    x, y = (list(part) for part in zip(*samples, strict=True))
    return tuple(nn.utils.rnn.pack_sequence(part, enforce_sorted=False) for part in (x, y))


def packed_sequence_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0].data), batch[1].data)


def tokens_of_packed(batch: Any) -> Tensor:
    _, lengths = nn.utils.rnn.pad_packed_sequence(batch[0])
    return lengths / lengths.sum()


# Ids and loaders ------------------------------------------------------------------------------------------------


def with_ids() -> Data:
    """Ids of the user's own, here the samples' numbers."""
    data = vectors()
    parts = [
        [{"x": x, "y": y, "sample_id": row} for row, (x, y) in enumerate(each)]
        for each in (data.samples, data.held_out)
    ]
    return Data(parts[0], parts[1])


class Stream(IterableDataset[Any]):
    """Samples in an order, as a stream."""

    def __init__(self, samples: Sequence[Any], order: Sequence[int]) -> None:
        self.samples, self.order = samples, order

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[row] for row in self.order)


def streamed() -> Data:
    def loader(data: Data, samples: Sequence[Any], order: Sequence[int]) -> Iterable[Any]:
        return DataLoader(Stream(samples, order), data.batch_size)

    data = vectors()
    return Data(data.samples, data.held_out, loader=loader)


class Reordered(Fitted):
    """A hook of the user's own reverses the batch."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [part.flip(0) for part in batch]


names = family(data=collated(lambda x, y: {"x": x, "y": y}), network=mlp())
lists = family(network=pooled)
vectors_case = family(data=vectors, network=mlp())

BATCHES = cases(
    "batches",
    vectors_case("a tuple", cross_entropy),
    names("a dict", by_name),
    names("a NamedTuple", by_attribute, data=collated(Pair)),
    names("a dataclass", by_attribute, data=collated(Record)),
    names(
        "an object with attributes",
        by_attribute,
        data=collated(lambda x, y: SimpleNamespace(x=x, y=y)),
        weighable=False,  # Lightning doesn't make its tensors float64
    ),
    names("a nested dict", nested, data=collated(lambda x, y: {"inputs": {"x": x}, "targets": [y]})),
    names("strings beside tensors", by_name, data=collated(with_strings)),
    names("scalars beside tensors", by_name, data=collated(with_scalars)),
    names("constants before the samples", by_name, data=collated(with_constants)),
    names("BatchEncoding", by_name, data=collated(lambda x, y: BatchEncoding({"x": x, "y": y}))),
    lists("a list of samples", of_samples, data=lists_of(lambda samples: samples)),
    lists("lists of images and targets", of_lists, data=lists_of(lambda samples: tuple(zip(*samples, strict=True)))),
    lists(
        "a list of dicts",
        of_dicts,
        data=lists_of(lambda samples: [{"image": image, **target} for image, target in samples]),
    ),
    family(network=tagger())(
        "padded as [T, B]",
        flat,
        data=lambda: split(ragged_samples(), collate=padded),
        shares=tokens_of_padded,
    ),
    family(network=tagger())(
        "tokens of all samples in a row",
        packed_loss,
        data=lambda: split(ragged_samples(), collate=concatenated),
        shares=lambda b: b["lengths"] / b["lengths"].sum(),
    ),
    family(network=tagger())(
        "PackedSequence",
        packed_sequence_loss,
        data=lambda: split(ragged_samples(), collate=packed),
        shares=tokens_of_packed,
    ),
    family(network=tagger())("graphs", graph_loss, data=lambda: split(ragged_samples(), collate=graph)),
    names("ids of the user's own", by_name, data=with_ids),
    vectors_case("an IterableDataset", cross_entropy, data=streamed, ids_by_content=True),
    vectors_case("reversed by a hook", cross_entropy, module=Reordered),
    family(network=tagger())("square batches, collated by default", flat, data=tokens(BATCH, ragged=False)),
)
