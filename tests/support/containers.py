"""Containers with the interface of torch_geometric and tensordict, which the package knows by what they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Graph:
    """A graph with nodes, edges and one target: `torch_geometric.data.Data`."""

    def __init__(self, **parts: Any) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._parts:
            raise AttributeError(name)
        return self._parts[name]

    @property
    def num_nodes(self) -> int:
        return len(self._parts["x"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self._parts)

    @classmethod
    def of(cls, number: int, nodes: int | None = None) -> Graph:
        """Nodes, and edges from each to the next, that hold ``number``; graphs have different numbers of both."""
        count = 3 + number if nodes is None else nodes
        edges = torch.stack([torch.arange(count), (torch.arange(count) + 1) % count]).repeat(1, 1 + number % 2)
        return cls(
            x=torch.full((count, 2), float(number)),
            edge_index=edges,
            edge_attr=torch.full((edges.shape[1], 1), float(number)),
            y=torch.full((1,), float(number)),
        )


class GraphBatch(Graph):
    """Several graphs as one: `torch_geometric.data.Batch`."""

    num_graphs: int

    @classmethod
    def of(cls, graphs: list[Graph], remembers: bool = True) -> GraphBatch:  # type: ignore[override]
        counts = torch.tensor([graph.num_nodes for graph in graphs])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        edges = [graph.edge_index + start for graph, start in zip(graphs, starts.tolist(), strict=False)]
        parts: dict[str, Tensor] = {
            "x": torch.cat([graph.x for graph in graphs]),
            "edge_index": torch.cat(edges, 1),
            "edge_attr": torch.cat([graph.edge_attr for graph in graphs]),
            "y": torch.cat([graph.y for graph in graphs]),
            "batch": torch.arange(len(graphs)).repeat_interleave(counts),
            "ptr": starts,
        }
        batch = cls(**parts)
        batch.num_graphs = len(graphs)
        if remembers:
            sizes = {name: [getattr(graph, name).shape[-1 if name == "edge_index" else 0] for graph in graphs]
                     for name in ("x", "edge_index", "edge_attr", "y")}  # fmt: skip
            batch._slice_dict = {name: torch.tensor([0, *each]).cumsum(0) for name, each in sizes.items()}
        return batch

    @property
    def edge_owner(self) -> Tensor:
        """The graph of each edge, which its attribute holds."""
        return self.edge_attr[:, 0].long()


def of_graphs(count: int, remembers: bool = True, nodes: int | None = None) -> GraphBatch:
    return GraphBatch.of([Graph.of(number, nodes) for number in range(count)], remembers)


class TensorDictLike:
    """Tensors with common leading extents: `tensordict.TensorDict`."""

    def __init__(self, parts: dict[str, Any], batch_size: list[int]) -> None:
        self._parts = parts
        self.batch_size = torch.Size(batch_size)

    def keys(self) -> Any:
        return self._parts.keys()

    def items(self) -> Any:
        return self._parts.items()

    def __getitem__(self, key: str) -> Any:
        return self._parts[key]
