"""The number of samples in batches of every kind, and which sample each element of their tensors belongs to."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.tokenization_utils_base import BatchEncoding

from lightning_memsink.samples.batch import batch_size, is_index_of, tensors_in
from lightning_memsink.samples.batch_rows import UNPROVEN, rows_of, whole
from tests.support.containers import Graph, GraphBatch, TensorDictLike, of_graphs

B = 4


class Columns(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Fields:
    x: Tensor
    text: list[str]
    y: Tensor


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def whole_numbers(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


IMAGES = [ones(3, 5, 7 + n) for n in range(B)]
SAME_IMAGES = [ones(3, 5, 5) for _ in range(B)]
TARGETS = [{"boxes": ones(1 + n, 4), "labels": whole_numbers(1 + n)} for n in range(B)]
TOKENS = [whole_numbers(3 + n) for n in range(B)]

KNOWN: dict[str, Callable[[], Any]] = {
    "tensor": lambda: ones(B, 3),
    "pair": lambda: (ones(B, 3), whole_numbers(B)),
    "pair of ranks": lambda: [ones(B, 3), ones(B)],
    "pair of texts": lambda: (whole_numbers(B, 6), whole_numbers(B, 6)),
    "dict": lambda: {"x": ones(B, 3), "y": ones(B)},
    "nested dict": lambda: {"x": {"a": ones(B, 3), "b": ones(B, 2, 2)}, "y": ones(B)},
    "scalars beside": lambda: (torch.tensor(1.0), ones(B, 3), torch.tensor(3)),
    "strings beside": lambda: {"x": ones(B, 3), "name": ["a"] * B, "split": "train"},
    "other strings beside": lambda: {"x": ones(B, 3), "classes": ["cat", "dog"]},
    "UserDict": lambda: UserDict(x=ones(B, 3), y=ones(B)),
    "BatchEncoding": lambda: BatchEncoding({"input_ids": whole_numbers(B, 6), "attention_mask": whole_numbers(B, 6)}),
    "text beside another number": lambda: {"n": ones(5), "input_ids": whole_numbers(B, 6)},
    "NamedTuple": lambda: Columns(ones(B, 3), ones(B, 1)),
    "dataclass": lambda: Fields(ones(B, 3), ["a"] * B, ones(B)),
    "ModelOutput": lambda: SequenceClassifierOutput(loss=torch.tensor(1.0), logits=ones(B, 2)),
    "TensorDict": lambda: TensorDictLike({"x": ones(B, B), "y": ones(B, 3)}, [B]),
    "packed sequence": lambda: pack_sequence(TOKENS, enforce_sorted=False),
    "packed sequence beside": lambda: (pack_sequence(TOKENS, enforce_sorted=False), whole_numbers(B)),
    "graphs": lambda: of_graphs(B),
    "one graph": lambda: GraphBatch.of([Graph.of(0)]),
    "list of graphs": lambda: [Graph.of(n) for n in range(B)],
    "list of tensors": lambda: TOKENS,
    "list of dicts": lambda: [{"input_ids": tokens} for tokens in TOKENS],
    "list of equal texts": lambda: [{"input_ids": whole_numbers(6)} for _ in range(B)],
    "list of tuples": lambda: list(zip(IMAGES, TARGETS, strict=True)),
    "detection": lambda: (SAME_IMAGES, TARGETS),
    "detection, transposed": lambda: tuple(zip(*zip(SAME_IMAGES, TARGETS, strict=True), strict=True)),
    "one tensor of images and targets": lambda: (ones(B, 3, 5, 5), TARGETS),
    "paths decide": lambda: {"images": SAME_IMAGES, "paths": ["a"] * B},
    "strings": lambda: ["a"] * B,
    "empty": lambda: ones(0, 3),
}
SIZES = {"empty": 0, "one graph": 1}

UNKNOWN: dict[str, Callable[[], Any]] = {
    "list of equal images": lambda: SAME_IMAGES,
    "images of one height": lambda: IMAGES,
    "two columns or two samples": lambda: [ones(B, 3), ones(B, 3)],
    "a list of one": lambda: [ones(B, 3)],
    "tensors that disagree": lambda: {"nodes": ones(9, 3), "y": ones(B)},
    "a sample without a sample axis": lambda: {"input_ids": whole_numbers(6), "labels": whole_numbers(6)},
    "scalars": lambda: {"t": torch.tensor(1.0)},
    "nothing": lambda: None,
    "words": lambda: "abcd",
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_number_of_samples_is_known(name):
    assert batch_size(KNOWN[name]()) == SIZES.get(name, B)


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_number_of_samples_is_not_claimed(name):
    assert batch_size(UNKNOWN[name]()) is None


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("list of equal images", B),
        ("images of one height", B),
        ("two columns or two samples", B),
        ("two columns or two samples", 2),
        ("a list of one", B),
        ("a list of one", 1),
        ("tensors that disagree", B),
        ("a sample without a sample axis", 6),
    ],
)
def test_the_number_of_rows_fetched_decides(name, rows):
    batch = UNKNOWN[name]()
    assert batch_size(batch, rows) == rows and is_index_of(torch.arange(rows), batch, None)


@pytest.mark.parametrize("name", KNOWN)
def test_another_number_of_rows_changes_nothing(name):
    """As where collate_fn leaves samples out."""
    batch = KNOWN[name]()
    assert batch_size(batch, 97) == SIZES.get(name, B) and not is_index_of(torch.arange(97), batch, B)


def test_an_axis_proven_at_the_loader_shows_the_number_of_samples():
    batch = {"x": ones(7, B)}
    assert batch_size(batch, B) == 7
    assert batch_size(batch, B, (1,)) == B and is_index_of(torch.arange(B), batch, B, (1,))


def of(batch: Any, size: int = B, axes: Any = None) -> dict[int, list[Any]]:
    """Owners by position of the tensor."""
    place = {id(tensor): n for n, tensor in enumerate(tensors_in(batch))}
    rows = rows_of(batch, size, axes)
    for tensor, owners in rows:
        assert owners.dtype == torch.int64 and owners.device.type == "cpu" and owners.ndim == tensor.ndim
        assert all(own in (1, extent) for own, extent in zip(owners.shape, tensor.shape, strict=True))
    return {place[id(tensor)]: owners.squeeze().tolist() for tensor, owners in rows}


def shape_of(batch: Any, size: int = B, axes: Any = None) -> list[tuple[int, ...]]:
    return [tuple(owners.shape) for _, owners in rows_of(batch, size, axes)]


ARANGE = list(range(B))


@pytest.mark.parametrize(
    "name", ["dict", "nested dict", "pair", "strings beside", "NamedTuple", "dataclass", "UserDict"]
)
def test_rows_of_tensors_lie_along_the_first_axis(name):
    batch = KNOWN[name]()
    assert of(batch) == {n: ARANGE for n in range(sum(1 for _ in tensors_in(batch)))}
    assert all(shape[0] == B and set(shape[1:]) <= {1} for shape in shape_of(batch))


def test_a_tensor_without_a_row_for_each_sample_is_left_out():
    assert of((torch.tensor(1.0), ones(B, 3), ones(5, 2))) == {1: ARANGE}


def test_two_axes_of_that_extent_need_proof():
    square = {"x": ones(B, B), "y": ones(B)}
    assert of(square) == {1: ARANGE}
    assert shape_of(square, axes=(0, 0)) == [(B, 1), (B,)]
    assert shape_of(square, axes=(1, 0)) == [(1, B), (B,)]
    assert of(square, axes=(UNPROVEN, 0)) == {1: ARANGE}
    assert of(square, axes=(None, 0)) == {1: ARANGE}


def test_the_second_axis_needs_proof():
    assert of({"x": ones(7, B)}) == {}
    assert shape_of({"x": ones(7, B)}, axes=(1,)) == [(1, B)]


def test_proof_for_other_tensors_is_not_taken():
    assert of({"x": ones(B, B)}, axes=(0, 0)) == {}
    assert of({"x": ones(7, B)}, axes=(0,)) == {}


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels"])
def test_text_is_batch_first_by_convention(name):
    assert shape_of({name: whole_numbers(B, B)}) == [(B, 1)]


def test_a_tensor_dict_says_its_leading_extent():
    assert shape_of(KNOWN["TensorDict"]()) == [(B, 1), (B, 1)]


def test_each_element_of_a_list_of_samples_is_one_sample():
    assert of(TOKENS) == dict(enumerate(range(B)))
    assert of((IMAGES, TARGETS)) == {n: n if n < B else (n - B) // 2 for n in range(3 * B)}
    assert of(KNOWN["list of tuples"]()) == {n: n // 3 for n in range(3 * B)}
    assert of([{"input_ids": whole_numbers(6)} for _ in range(B)]) == dict(enumerate(range(B)))


def test_a_list_that_may_be_columns_needs_proof():
    three = [ones(3, 5, 5) for _ in range(3)]
    assert of(three, 3) == {}
    assert of(three, 3, (whole(0), whole(1), whole(2))) == {0: 0, 1: 1, 2: 2}
    assert shape_of(three, 3, (0, 0, 0)) == [(3, 1, 1)] * 3


def test_a_list_beside_a_batch_needs_proof():
    """Feature maps of four scales in a batch of four are no four samples."""
    scales = {"x": ones(B, 2), "scales": [ones(16 >> n, 16 >> n) for n in range(B)]}
    assert of(scales) == {0: ARANGE}
    assert of(scales, axes=(0, *map(whole, range(B)))) == {0: ARANGE, **{n + 1: n for n in range(B)}}


def test_a_packed_sequence_says_whose_each_row_is():
    texts = [torch.full((length,), n) for n, length in enumerate((2, 5, 3, 1))]
    packed = pack_sequence(texts, enforce_sorted=False)
    assert rows_of(packed, B)[0][1].tolist() == packed.data.tolist()
    by_length = pack_sequence(sorted(texts, key=len, reverse=True))
    assert rows_of(by_length, B)[0][1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0]
    assert of((packed, whole_numbers(B)))[4] == ARANGE
    assert of(packed, 3) == {}


@pytest.mark.parametrize("remembers", [True, False], ids=["slices", "batch vector"])
def test_graphs_say_whose_nodes_and_edges_are(remembers):
    graphs = of_graphs(B, remembers)
    found = {name: owners for name, part in graphs.to_dict().items() for x, owners in rows_of(graphs, B) if x is part}
    for name, owners in found.items():
        own = {"edge_index": graphs.edge_owner, "edge_attr": graphs.edge_owner, "y": torch.arange(B)}.get(
            name, graphs.batch
        )
        assert torch.equal(owners.flatten(), own), name
    assert found.keys() >= {"x", "edge_index", "edge_attr", "y"} and found["edge_index"].shape[0] == 1


def test_a_graph_level_tensor_with_as_many_rows_as_nodes_is_left_out_unless_remembered():
    """Every graph has one node, so that a row may be a node's or a graph's: both are the same sample's."""
    graphs = of_graphs(B, remembers=False, nodes=1)
    rows = [owners.flatten().tolist() for tensor, owners in rows_of(graphs, B) if tensor is graphs.y]
    assert rows in ([], [ARANGE])


def test_seeds_of_a_neighbour_loader_are_the_samples():
    loaded = Graph.of(5)
    loaded.batch_size = 2
    assert batch_size(loaded) == 2
    found = {id(tensor): owners.flatten().tolist() for tensor, owners in rows_of(loaded, 2)}
    assert found[id(loaded.x)] == [0, 1] + [-1] * (len(loaded.x) - 2)
    assert id(loaded.edge_attr) not in found


def test_all_of_a_batch_of_one_belongs_to_it():
    assert shape_of({"x": ones(1, 1, 5), "y": ones(1)}, 1) == [(1, 1, 1), (1,)]
    assert of([ones(3, 5, 5)], 1) == {0: 0}
    assert of(([ones(3, 5, 5)], [{"boxes": ones(2, 4)}]), 1) == {0: 0, 1: 0}
