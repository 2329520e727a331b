"""What a case of the matrix is: a training step as a user writes it, its data, and what each sample's loss is.

A step is ``step(model, batch)``; ``model`` is the user's LightningModule, or, when the truth is computed, a `Twin` of
it with the same weights. A sample's loss is what the same step gives for a batch of one, or, where a batch of one is
another thing (contrastive losses, batch norm), a formula for the rows of the whole batch.

    B  samples in a batch      T  tokens of a sample      C  classes      D  features
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.samples.sample_ids import SampleIds

Step = Callable[[Any, Any], Any]
"""``(model, batch)`` to the loss, or to ``[B]``."""

BATCH = 4


@dataclass(frozen=True)
class Data:
    """Samples to train and to validate on, and how they become batches."""

    samples: Sequence[Any]
    held_out: Sequence[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    batch_size: int = BATCH
    loader: Callable[[Data, Sequence[Any], Sequence[int]], Iterable[Any]] | None = None
    """Makes the loader of some samples in an order, in place of a DataLoader."""

    def batches(self, samples: Sequence[Any], order: Sequence[int]) -> Iterable[Any]:
        """The loader: ``order`` are the samples' numbers as they come, ``batch_size`` at a time."""
        if self.loader is not None:
            return self.loader(self, samples, order)
        return DataLoader(samples, self.batch_size, sampler=order, collate_fn=self.collate)  # type: ignore[arg-type]


class Fitted(LightningModule):
    """The user's module: ``net``, and the case's step in training and validation."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.net = case.network()
        self.automatic_optimization = case.automatic
        self._run = [torch.compile(self.net, backend=case.compiled) if case.compiled else self.net]  # no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run[0](*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.case.step(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        result = (self.case.validation or self.case.step)(self, batch)
        loss = result["loss"] if isinstance(result, Mapping) else result
        if loss is not None:
            self.log("val_loss", loss, batch_size=1)
        return result if self.case.returns or isinstance(result, Mapping) else None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.case.lr)


class Twin:
    """A copy of a user's module that runs and differentiates its step and leaves no trace in it."""

    def __init__(self, module: Fitted) -> None:
        self.net = copy.deepcopy(module.net)
        self.training = module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())


@dataclass(frozen=True)
class Case:
    """One line of the matrix.

    The loss of a step is the sum over samples of ``shares`` times the sample's loss, and ``rest``. That is checked, so
    that no case has a wrong truth; and it says what the gradient is without some samples.
    """

    name: str
    step: Step
    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    unit: str = "the loss of the sample alone"
    kind: str = ""
    alone: Step | None = None
    """The loss of a batch of one; None: the step."""
    rows: Step | None = None
    """``[B]`` losses from the whole batch, where a batch of one is another thing."""
    also: Callable[[Any], Tensor] | None = None
    """``[B]`` factors from the batch: losses times these are right, too, if training and validation agree on it."""
    shares: Callable[[Any], Tensor] | None = None
    """``[B]`` coefficients of the samples' losses in the step's loss; None: ``1/B``."""
    rest: Step | None = None
    """The part of the loss that belongs to no sample."""
    contributions: Step | None = None
    """``[B]`` parts of the loss, whose gradients are the samples', where ``shares`` times losses are not."""
    weighable: bool = True
    """Whether the loss is a sum over samples, so that a sample can be left out of its gradient."""
    must_refuse: bool = False
    """Whether no sample has a loss of its own, so that only a refusal is right."""
    validation: Step | None = None
    """What ``validation_step`` does; None: the same."""
    validation_refused: bool = False
    """Whether validation has another loss, so that only a refusal is right."""
    returns: bool = False
    """Whether ``validation_step`` returns its loss besides logging it."""
    compiled: str | None = None
    """The backend of ``torch.compile``: for ``net``, or for what ``module`` compiles."""
    without_loss: Sequence[int] = ()
    """Numbers of training batches that the user's module skips."""
    automatic: bool = True
    lr: float = 0.1
    tolerance: float = 1e-4
    """Of a recorded loss, relative to 1 + its size."""
    module: type[Fitted] = Fitted
    tracker: Callable[[], LossTracker] = LossTracker
    ids_by_content: bool = False
    """Whether ids are hashes of the content, because the loader can't say which row a sample is."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the Trainer."""

    def losses(self, model: Any, collate: Callable[[list[Any]], Any], samples: Sequence[Any]) -> Tensor:
        """``[B]`` each sample's loss, with its graph; NaN where none of its elements counts."""
        if self.rows is not None:
            rows: Tensor = self.rows(model, collate(list(samples)))
            return rows
        return torch.stack([_value(self._of_one(model, collate([sample]))) for sample in samples])

    def parts(self, model: Any, collate: Callable[[list[Any]], Any], samples: Sequence[Any]) -> Tensor:
        """``[B]`` each sample's part of the step's loss, with its graph; 0 where none of its elements counts."""
        batch = collate(list(samples))
        if self.contributions is not None:
            parts: Tensor = self.contributions(model, batch)
            return parts
        losses = self.losses(model, collate, samples)
        shares = torch.full_like(losses, 1 / len(losses)) if self.shares is None else self.shares(batch).to(losses)
        counted = (shares != 0).nonzero()[:, 0]
        return torch.zeros_like(losses).index_add(0, counted, shares[counted] * losses[counted])

    def ids(self, data: Data, samples: Sequence[Any]) -> list[int]:
        """The id that the ledger has for each of ``samples``."""
        if not self.ids_by_content:
            return list(range(len(samples)))
        hashes = [SampleIds("content").of(data.collate([sample]), None) for sample in samples]
        return [int(one) for one in hashes if one is not None]

    def _of_one(self, model: Any, batch: Any) -> Any:
        return (self.alone or self.step)(model, batch)


def _value(result: Any) -> Tensor:
    loss: Tensor = result["loss"] if isinstance(result, Mapping) else result
    return loss.reshape(())


def cases(kind: str, *made: Case) -> list[Case]:
    """``made`` with their kind."""
    return [_of_kind(each, kind) for each in made]


def _of_kind(case: Case, kind: str) -> Case:
    return Case(**{**case.__dict__, "kind": kind})


def family(**shared: Any) -> Callable[..., Case]:
    """A `Case` with some arguments given."""
    return partial(Case, **shared)
