"""Ways to per-sample gradient norms, ours and others', each as a full training step.

A way takes a `Task`'s model and gives a step: forward, backward, norms, AdamW. What a step returns is ``[B]``, the
squared norm of each sample's gradient of its own mean loss over all parameters, or None if it reads none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from lightning_memsink.attribution.ghost_norms import outer_squared_norm
from lightning_memsink.attribution.gradient_norms import GradientNorms, total_squared_norm
from lightning_memsink.attribution.gradient_rules import outer_of
from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.attribution.unit_recorder import UnitRecorder

IGNORED = -100


@dataclass(frozen=True)
class Task:
    """``model()`` maps a batch's inputs to logits ``[B, ..., classes]``; ``batch(seed)`` gives inputs and targets."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    bound: float
    """Of exact norms every step, against a plain one."""
    by_floor: bool = False
    """Held against `bare_products` instead: where samples are as long as the model is wide, the products alone, which
    no exact method can do without, come to more than the bound."""


Step = Callable[[Tensor, Tensor], Tensor | None]
Way = Callable[[nn.Module], Step]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def own_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``[B]``"""
    losses = functional.cross_entropy(logits.movedim(-1, 1), targets, ignore_index=IGNORED, reduction="none")
    return losses.flatten(1).sum(1) / (targets != IGNORED).flatten(1).sum(1) if losses.ndim > 1 else losses


def _training(model: nn.Module, gradients: Callable[[Tensor, Tensor], Tensor | None]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(inputs: Tensor, targets: Tensor) -> Tensor | None:
        optimizer.zero_grad()
        norms = gradients(inputs, targets)
        optimizer.step()
        return norms

    return step


def _squares(gradients: Any) -> Tensor:
    return torch.stack([each.flatten(1).square().sum(1) for each in gradients]).sum(0)


def plain(model: nn.Module) -> Step:
    return _training(model, lambda inputs, targets: mean_loss(model(inputs), targets).backward())


def units(model: nn.Module) -> Step:
    recorder = UnitRecorder(find_hidden_layers(model))

    def gradients(inputs: Tensor, targets: Tensor) -> None:
        recorder.open()
        mean_loss(model(inputs), targets).backward()
        recorder.finish(len(inputs))

    return _training(model, gradients)


def norms(model: nn.Module) -> Step:
    recorder = GradientNorms(model)

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        recorder.open()
        mean_loss(model(inputs), targets).backward()
        return total_squared_norm(recorder.finish(len(inputs), torch.full((len(inputs),), 1 / len(inputs))))

    return _training(model, gradients)


def closed_norms(model: nn.Module) -> Step:
    """A step between two that are read: its hooks are registered and closed."""
    GradientNorms(model)
    return plain(model)


def bare_products(model: nn.Module) -> Step:
    """A plain step and, on tensors of the same shapes, the products that exact norms of linear layers come down to:
    no hook, no other layer, nothing kept. What any exact method that reads the user's own backward costs at least."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if given[0].ndim == 3:
            pairs.append((torch.randn_like(output), torch.randn_like(given[0])))

    handles = [each.register_forward_hook(note) for each in model.modules() if outer_of(each) is not None]

    def gradients(inputs: Tensor, targets: Tensor) -> None:
        mean_loss(model(inputs), targets).backward()
        for handle in handles:
            handle.remove()
        for left, right in pairs:
            outer_squared_norm(left, right)

    return _training(model, gradients)


def opacus_hooks(model: nn.Module) -> Step:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="mean")

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        mean_loss(wrapped(inputs), targets).backward()
        found = _squares(weight.grad_sample for weight in model.parameters())
        for weight in model.parameters():
            weight.grad_sample = None
        return found

    return _training(model, gradients)


def _opacus_ghost(model: nn.Module, backwards: int) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="mean"
    )

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        losses = own_losses(wrapped(inputs), targets)
        losses.mean().backward(retain_graph=backwards == 2)
        found = wrapped.get_norm_sample()
        if backwards == 2:
            model.zero_grad()
            wrapped.disable_hooks()
            (wrapped.get_clipping_coef() * losses).mean().backward()
            wrapped.enable_hooks()
        for weight in model.parameters():
            weight._norm_sample = None
        return found.square()

    return _training(model, gradients)


def opacus_ghost_first(model: nn.Module) -> Step:
    return _opacus_ghost(model, backwards=1)


def opacus_ghost(model: nn.Module) -> Step:
    return _opacus_ghost(model, backwards=2)


def vmap_grad(model: nn.Module) -> Step:
    weights = dict(model.named_parameters())  # a tied one once: functional_call follows the tie

    def own_loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return own_losses(functional_call(model, values, (sample[None],)), target[None])[0]

    per_sample = vmap(grad(own_loss), in_dims=(None, 0, 0))

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        found = per_sample({name: weight.detach() for name, weight in weights.items()}, inputs, targets)
        for name, weight in weights.items():
            weight.grad = found[name].mean(0)
        return _squares(found.values())

    return _training(model, gradients)


def expanded_weights(model: nn.Module) -> Step:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = call_for_per_sample_grads(model, batch_size=len(inputs), loss_reduction="mean")(inputs)
        mean_loss(logits, targets).backward()
        found = _squares(weight.grad_sample for weight in model.parameters())
        for weight in model.parameters():
            weight.grad, weight.grad_sample = weight.grad_sample.mean(0), None
        return found

    return _training(model, gradients)


def _backpack(model: nn.Module, extension: str) -> Step:
    import backpack
    from backpack import extensions

    extended, extension_type = backpack.extend(model), getattr(extensions, extension)
    saved = extension_type().savefield

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor | None:
        with backpack.backpack(extension_type()):
            mean_loss(extended(inputs), targets).backward()
        # It passes over layers it has no rule for, the normalizations here.
        read = [weight for weight in model.parameters() if saved in vars(weight)]
        found = [getattr(weight, saved) for weight in read]
        for weight in read:
            delattr(weight, saved)
        # Theirs are of each sample's part of the mean.
        return (torch.stack(found).sum(0) if extension == "BatchL2Grad" else _squares(found)) * len(inputs) ** 2

    return _training(model, gradients)


def backpack_gradients(model: nn.Module) -> Step:
    return _backpack(model, "BatchGrad")


def backpack_norms(model: nn.Module) -> Step:
    return _backpack(model, "BatchL2Grad")


def loop(model: nn.Module) -> Step:
    weights = list(model.parameters())

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        found = []
        for sample, target in zip(inputs.split(1), targets.split(1), strict=True):
            own = torch.autograd.grad(mean_loss(model(sample), target), weights)
            found.append(sum(each.square().sum() for each in own))
            for weight, each in zip(weights, own, strict=True):
                part = each / len(inputs)
                weight.grad = part if weight.grad is None else weight.grad.add_(part)
        return torch.stack(found)

    return _training(model, gradients)


FLOOR = "floor: the products of linear layers alone"
OURS: dict[str, Way] = {
    "units, every step": units,
    "exact norms, every step": norms,
    "exact norms, between two": closed_norms,
    FLOOR: bare_products,
}
PEERS: dict[str, Way] = {
    "Opacus hooks": opacus_hooks,
    "Opacus ghost, first backward": opacus_ghost_first,
    "Opacus ghost, as shipped": opacus_ghost,
    "torch.func vmap": vmap_grad,
    "ExpandedWeights": expanded_weights,
    "BackPACK BatchGrad": backpack_gradients,
    "BackPACK BatchL2Grad": backpack_norms,
    "batch of one, in a loop": loop,
}
