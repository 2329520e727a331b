"""Squared gradient norms from one backward pass a sample: the oracle for those from one pass for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_memsink.attribution.gradient_norms import GradientNorms, total_squared_norm

Loss = Callable[[nn.Module, Tensor], Tensor]
VOCABULARY, SAMPLES, LENGTH = 23, 4, 6
TOKENS = torch.randint(1, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 0.3).square().mean()


def language(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def one_by_one(model: nn.Module, batch: Tensor, loss: Loss, axis: int = 0) -> dict[str, Tensor]:
    """``[B]`` squared norms by module that has the parameter first, one backward a sample."""
    rows = []
    for sample in batch.split(1, axis):
        model.zero_grad()
        loss(model, sample).backward()
        norms: dict[str, float] = {}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                module = name.rpartition(".")[0]
                norms[module] = norms.get(module, 0.0) + float(weight.grad.to_dense().double().square().sum())
        rows.append(norms)
    model.zero_grad()
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in rows[0]}


def in_one(model: nn.Module, batch: Tensor, loss: Loss, axis: int = 0) -> tuple[dict[str, Tensor], GradientNorms]:
    recorder = GradientNorms(model, batch_axis=axis)
    recorder.open()
    loss(model, batch).backward()
    samples = batch.shape[axis]
    norms = recorder.finish(samples, torch.full((samples,), 1 / samples))
    recorder.remove()
    return norms, recorder


def agree(model: nn.Module, batch: Tensor, loss: Loss = mean_square, axis: int = 0, rtol: float = 1e-5) -> None:
    oracle = one_by_one(model, batch, loss, axis)
    norms, recorder = in_one(model, batch, loss, axis)
    assert recorder.covered == 1 and not recorder.uncovered
    expected = torch.stack(list(oracle.values())).sum(0)
    # An output near zero is a small difference of large products: its gradient has their rounding, not its own.
    assert_close(total_squared_norm(norms), expected, rtol=rtol, atol=1e-6 * float(expected.max()))
    floor = 1e-7 * float(total_squared_norm(norms).max())
    for name in norms.keys() & oracle.keys():
        assert_close(norms[name], oracle[name], rtol=rtol, atol=floor, msg=lambda text, name=name: f"{name}: {text}")
