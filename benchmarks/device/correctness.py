"""Is what is read on the device right, and are weights the same to the bit with and without watching?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from benchmarks.common.criteria import Criterion
from benchmarks.device.fits import Settings, deterministic
from benchmarks.device.models import Training, ZipfText
from lightning_memsink import SampleGradientMask, memsink
from lightning_memsink.attribution.gradient_norms import GradientNorms, total_squared_norm
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.mitigation.designed_sinks import own_units

HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WATCHING: dict[str, Callable[[], list[Callback]]] = {
    "the same again": list,
    "watch": lambda: memsink(path=None),
    "units and norms": lambda: memsink(path=None, localize=True, every=2),
    "hold with nothing to hold": lambda: memsink(SampleGradientMask(at=1e6), path=None),
    "margins": lambda: memsink(path=None, localize=True, every=2, objective="margin"),
}


def checks(settings: Settings) -> Iterator[tuple[str, Callable[[], list[Criterion]]]]:
    """Each check by name, in the order to make them."""
    yield "losses, fp32", partial(losses, settings, "32-true")
    yield "losses, bf16", partial(losses, settings, "bf16-mixed")
    yield "losses, Llama, bf16", partial(losses, settings, "bf16-mixed", llama=True)
    yield "losses, bf16 weights", partial(losses, settings, "bf16-true", bound=1e-2)
    if settings.cuda:
        yield "losses, fp16", partial(losses, settings, "16-mixed")
    yield "losses, compiled", partial(losses, settings, "bf16-mixed", compiled="default", bound=3e-3)
    yield "losses, CUDA graphs", partial(losses, settings, "bf16-mixed", compiled="reduce-overhead", bound=3e-3)
    for precision in ["32-true", "bf16-mixed", *(["16-mixed"] if settings.cuda else [])]:
        yield f"weights, {precision}", partial(weights_unchanged, settings, precision)
    yield "samples left out", partial(samples_left_out, settings)
    yield "norms, fp32", partial(gradient_norms, settings, "32-true", 1e-3)
    yield "norms, bf16", partial(gradient_norms, settings, "bf16-mixed", 2e-2)
    yield "units", partial(units, settings)


def losses(
    settings: Settings, precision: str, llama: bool = False, compiled: str = "", bound: float = 1e-3
) -> list[Criterion]:
    """Relative error of the ledger's losses against each sample alone, at weights that don't move."""
    shape = settings.small()
    model = _model(settings, llama)
    if compiled:
        options = settings.backend() or {"mode": compiled}
        model = torch.compile(model, **options)  # type: ignore[assignment]
    module = Training(model, rate=0.0, loss_inside=compiled == "reduce-overhead")
    callbacks: list[Any] = memsink(path=None, identity="index")
    train, held_out = settings.tokens(shape, batches=6, padded=True)
    settings.fit(module, (train, held_out), 14, callbacks, precision, every=6)
    table, controls = callbacks[0].table, callbacks[0].controls
    alone = Training(_model(settings, llama))
    name = f"{precision}{', Llama' * llama}{', compiled ' + compiled if compiled else ''}"
    read = table.last_loss[table.index.find(torch.arange(len(train.dataset)))]  # type: ignore[arg-type]
    return [
        Criterion(
            f"relative error of a loss, {name}{', held out' if loader is held_out else ''}",
            _worst(values, _one_by_one(settings, alone, loader.dataset, precision)),
            "<=",
            bound,
        )
        for loader, values in ((train, read), (held_out, controls.latest[controls.ids.argsort()]))
    ]


def _worst(found: Tensor, truth: Tensor) -> float:
    return float(((found.cpu() - truth).abs() / truth).nan_to_num(nan=9).max())


def _one_by_one(settings: Settings, module: Training, rows: Any, precision: str) -> Tensor:
    """``[N]`` each sample's loss in a batch of its own."""
    half = HALVES.get(precision)
    module = module.to(settings.device).eval()
    with torch.no_grad(), torch.autocast(settings.device, half or torch.bfloat16, enabled=half is not None):
        return torch.tensor(
            [
                float(module.training_step({name: part[None].to(settings.device) for name, part in rows[row].items()}))
                for row in range(len(rows))
            ]
        )


def weights_unchanged(settings: Settings, precision: str) -> list[Criterion]:
    """Largest difference of a weight after a fit with callbacks that only watch."""

    def fitted(callbacks: list[Callback]) -> list[Tensor]:
        with deterministic():
            seed_everything(1, verbose=False)
            module = Training(_model(settings), rate=1e-3)
            settings.fit(module, settings.tokens(settings.small(), 6, True), 16, callbacks, precision, every=5)
        return [weight.detach().double().cpu() for weight in module.parameters()]

    plain = fitted([])
    return [
        Criterion(
            f"largest change of a weight, {precision}, {name}",
            max(float((a - b).abs().max()) for a, b in zip(plain, fitted(make()), strict=True)),
            "<=",
            0,
        )
        for name, make in WATCHING.items()
    ]


def samples_left_out(settings: Settings) -> list[Criterion]:
    """The gradient of a step in which every second sample has weight 0, against the loss written by hand."""
    rows = _batch(settings)
    size = len(rows["labels"])
    weights = torch.tensor([1.0, 0.0] * (size // 2), device=settings.device)
    module = Training(_model(settings)).to(settings.device)
    reader = StepReader(module)
    reader.begin(rows, size)
    loss = module.training_step(rows)
    OpenLoss(loss, size, reader.read(loss)).weigh_samples(weights)
    reader.end()
    loss.backward()
    found = _gradients(module)
    module.training_step(rows).backward()
    whole = _gradients(module)
    logits, labels = module.model(rows["input_ids"])[:, :-1], rows["labels"][:, 1:]
    each = functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    ((each * weights[:, None]).sum() / (labels != -100).sum()).backward()
    truth = _gradients(module)
    return [
        Criterion("relative change of the gradient by leaving samples out", _distance(found, whole), ">=", 1e-2),
        Criterion("relative error of the gradient with samples left out", _distance(found, truth), "<=", 1e-4),
    ]


def gradient_norms(settings: Settings, precision: str, bound: float) -> list[Criterion]:
    """Relative error of samples' gradient norms, against a backward for each sample."""
    rows = _batch(settings, padded=False)
    size = len(rows["labels"])
    module = Training(_model(settings)).to(settings.device)
    half = torch.autocast(settings.device, torch.bfloat16, enabled=precision != "32-true")
    norms = GradientNorms(module)
    norms.open()
    with half:
        loss = module.training_step(rows)
    loss.backward()
    found = total_squared_norm(norms.finish(size)).sqrt().double() * size
    norms.remove()
    truth = []
    for row in range(size):
        module.zero_grad()
        with half:
            loss = module.training_step({name: part[row : row + 1] for name, part in rows.items()})
        loss.backward()
        squares = [weight.grad.double().square().sum() for weight in module.parameters() if weight.grad is not None]
        truth.append(torch.stack(squares).sum().sqrt())
    return [
        Criterion(
            f"relative error of a gradient norm, {precision}", _worst(found, torch.stack(truth).cpu()), "<=", bound
        )
    ]


def units(settings: Settings) -> list[Criterion]:
    """The pool units of ids are the same on the device as on the CPU."""
    ids = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    there = own_units(ids.to(settings.device), 2304, 346).cpu()
    different = float((own_units(ids, 2304, 346) ^ there).sum())
    return [Criterion("own units that differ from those on the CPU", different, "<=", 0)]


def _model(settings: Settings, llama: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return replace(settings.small(), llama=llama).build()


def _batch(settings: Settings, padded: bool = True) -> dict[str, Tensor]:
    shape = settings.small()
    rows = ZipfText(shape.batch, shape.length, shape.vocabulary, 3, padded)
    batch = default_collate([rows[row] for row in range(shape.batch)])
    return {name: part.to(settings.device) for name, part in batch.items()}


def _gradients(module: nn.Module) -> list[Tensor]:
    """Of all weights; they are zero afterwards."""
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    module.zero_grad(set_to_none=True)
    return gradients


def _distance(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
