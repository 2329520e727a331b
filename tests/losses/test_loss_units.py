"""The unit of a loss is known from what the loss is made of, however it is written."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.loss_units import (
    LossUnit,
    can_be_ratio,
    joint_unit,
    scale_of_graph,
    scale_of_kind,
)
from lightning_memsink.losses.per_sample import Captured, per_sample
from lightning_memsink.losses.unreduced import has_reduction

B, C, T = 6, 4, 5
SEEDED = torch.Generator().manual_seed(0)
X, Y, TARGET = torch.randn(B, 3, generator=SEEDED), torch.arange(B) % C, torch.rand(B, C, generator=SEEDED)
LINEAR = nn.Linear(3, C)
with torch.no_grad():
    LINEAR.weight.copy_(torch.randn(C, 3, generator=SEEDED) / 2)
ONES, FLAGS = torch.ones(B, C), (TARGET > 0.5).float()


def out(x=X):
    return LINEAR(x)


def probability():
    return out().softmax(-1).gather(1, Y[:, None])


def cross_entropies():
    return F.cross_entropy(out(), Y, reduction="none")


LIKELIHOODS = {
    "cross entropy": lambda: F.cross_entropy(out(), Y),
    "cross entropy, unreduced": lambda: cross_entropies().mean(),
    "label smoothing": lambda: F.cross_entropy(out(), Y, label_smoothing=0.1),
    "soft labels": lambda: F.cross_entropy(out(), TARGET.softmax(-1)),
    "nll": lambda: F.nll_loss(F.log_softmax(out(), -1), Y),
    "log-softmax by hand": lambda: -F.log_softmax(out(), -1).gather(1, Y[:, None]).mean(),
    "logarithm by hand": lambda: -probability().log().mean(),
    "logarithm, clamped": lambda: -probability().clamp(min=1e-6).log().clamp(min=-100).mean(),
    "log-sum-exp": lambda: (out().logsumexp(-1) - out()[:, 0]).mean(),
    "bce": lambda: F.binary_cross_entropy(out().sigmoid(), TARGET),
    "bce with logits": lambda: F.binary_cross_entropy_with_logits(out(), TARGET),
    "bce by hand": lambda: -(TARGET * out().sigmoid().log() + (1 - TARGET) * (1 - out().sigmoid()).log()).mean(),
    "logistic by hand": lambda: F.softplus(-out() * (2 * FLAGS - 1)).mean(),
    "log-sigmoid": lambda: -F.logsigmoid(out() * TARGET).mean(),
    "soft margin": lambda: F.soft_margin_loss(out(), 2 * FLAGS - 1),
    "kl": lambda: F.kl_div(F.log_softmax(out(), -1), TARGET.softmax(-1), reduction="batchmean"),
    "gaussian": lambda: F.gaussian_nll_loss(out(), TARGET, ONES),
    "gaussian by hand": lambda: ((out()[:, :2] - TARGET[:, :2]) ** 2 * (-out()[:, 2:]).exp() + out()[:, 2:]).mean(),
    "gaussian as a distribution": lambda: (
        -torch.distributions.Normal(out()[:, :2], F.softplus(out()[:, 2:])).log_prob(TARGET[:, :2]).mean()
    ),
    "categorical": lambda: -torch.distributions.Categorical(logits=out()).log_prob(Y).mean(),
    "negative binomial": lambda: -torch.distributions.NegativeBinomial(ONES, logits=out()).log_prob(ONES).mean(),
    "poisson": lambda: F.poisson_nll_loss(out(), TARGET),
    "poisson by hand": lambda: (out().exp() - TARGET * out()).mean(),
    "focal": lambda: ((1 - (-cross_entropies()).exp()) ** 2 * cross_entropies()).mean(),
    "a report": lambda: per_sample(cross_entropies()),
}
SCALES = {
    "mse": lambda: F.mse_loss(out(), TARGET),
    "mse, unreduced": lambda: F.mse_loss(out(), TARGET, reduction="none").sum(1).mean(),
    "l1": lambda: F.l1_loss(out(), TARGET),
    "smooth l1": lambda: F.smooth_l1_loss(out(), TARGET),
    "huber": lambda: F.huber_loss(out(), TARGET),
    "square by hand": lambda: ((out() - TARGET) ** 2).mean(),
    "square of a logarithm": lambda: ((F.softplus(out()).log1p() - TARGET.log1p()) ** 2).mean(),
    "product by hand": lambda: ((out() - TARGET) * (out() - TARGET)).mean(),
    "norm": lambda: (out() - TARGET).norm(dim=1).mean(),
    "root": lambda: (out() - TARGET).square().mean(1).sqrt().mean(),
    "log-cosh": lambda: (out() - TARGET).cosh().log().mean(),
    "cosine": lambda: (1 - F.cosine_similarity(out(), TARGET)).mean(),
    "cosine embedding": lambda: F.cosine_embedding_loss(out(), TARGET, torch.ones(B)),
    "hinge": lambda: (1 - out() * (2 * FLAGS - 1)).clamp(min=0).mean(),
    "multi-margin": lambda: F.multi_margin_loss(out(), Y),
    "triplet": lambda: F.triplet_margin_loss(out(), TARGET, -TARGET),
    "quantile": lambda: torch.maximum(0.9 * (TARGET - F.softplus(out())), -0.1 * (TARGET - F.softplus(out()))).mean(),
    "dice": lambda: (1 - (2 * out().sigmoid() * TARGET).sum(1) / (out().sigmoid() + TARGET).sum(1)).mean(),
    "squares, of logarithms as features": lambda: ((out(X.abs().log1p()) - TARGET) ** 2).mean(),
    "a report": lambda: per_sample(F.mse_loss(out(), TARGET, reduction="none").mean(1)),
    "a function of the user's class": lambda: Squares.apply(out() - TARGET).mean(),
}


class Squares(torch.autograd.Function):
    """Whose graph shows its name only."""

    @staticmethod
    def forward(context, difference):
        context.save_for_backward(difference)
        return difference**2

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient * context.saved_tensors[0]


class FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, logits):
        context.save_for_backward(logits)
        return -logits.log_softmax(-1)[:, 0]

    @staticmethod
    def backward(context, gradient):
        chosen = torch.zeros_like(context.saved_tensors[0])
        chosen[:, 0] = 1
        return gradient[:, None] * (context.saved_tensors[0].softmax(-1) - chosen)


def step(capture: StepCapture, loss, batch=None) -> Captured:
    batch = {"x": X, "y": Y, "t": TARGET} if batch is None else batch
    size = len(next(iter(batch.values())))
    capture.begin(batch, size)
    made = loss()
    outputs = made if isinstance(made, dict) else {"loss": made}
    capture.before_backward(outputs["loss"])
    outputs["loss"].backward()
    found = capture.finish(outputs, size)
    assert isinstance(found, Captured), found
    return found


def unit_of(loss, batch=None):
    capture = StepCapture()
    step(capture, loss, batch)
    return capture.unit.unit


@pytest.mark.parametrize("loss", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_likelihoods_are_in_nats(loss):
    assert unit_of(loss) == "nats"


@pytest.mark.parametrize("loss", SCALES.values(), ids=SCALES)
def test_distances_and_margins_are_compared_as_ratios(loss):
    assert unit_of(loss) == "ratio"


def test_every_loss_function_of_torch_has_a_unit():
    """A new one in torch fails here until it is given one."""
    losses = [name for name in dir(F) if name.endswith("_loss") and has_reduction(getattr(F, name))]
    losses += ["kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy"]
    assert {name: scale_of_kind(name) for name in losses if scale_of_kind(name) is None} == {}


def test_a_fused_kernel_is_known_by_its_name():
    assert unit_of(lambda: FusedCrossEntropy.apply(out()).mean()) == "nats"


def test_a_loss_that_was_negative_is_in_nats_from_then_on():
    capture = StepCapture()
    step(capture, lambda: (1 - F.cosine_similarity(out(), TARGET)).mean())
    assert capture.unit.unit == "ratio"
    step(capture, lambda: (-1 - F.cosine_similarity(out(), TARGET)).mean())
    assert capture.unit.unit == "nats"
    step(capture, lambda: (1 - F.cosine_similarity(out(), TARGET)).mean())
    assert capture.unit.unit == "nats"


def test_unwatched_steps_neither_cost_nor_change_anything():
    capture = StepCapture()
    for _ in range(30):
        step(capture, LIKELIHOODS["bce"])
    assert not capture.reader.is_watching
    before = copy.deepcopy(vars(capture.unit))
    step(capture, LIKELIHOODS["bce"])
    assert vars(capture.unit) == before
    assert capture.unit.unit == "nats"


@pytest.mark.parametrize(("weight", "unit"), [(0.001, "ratio"), (1000.0, "nats")])
def test_of_several_losses_the_larger_share_decides(weight, unit):
    assert unit_of(lambda: F.mse_loss(out(), TARGET) + weight * F.cross_entropy(out(), Y)) == unit


def test_two_scales_are_a_scale():
    assert unit_of(lambda: F.mse_loss(out(), TARGET) + F.l1_loss(out(), TARGET)) == "ratio"


def tokens(shape=(B, T)):
    return {"input_ids": torch.randint(0, C, shape), "labels": torch.randint(0, C, shape)}


def of_tokens(batch, embedding, **options):
    return F.cross_entropy(embedding(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}], ids=str)
def test_a_loss_of_each_token_is_in_nats_per_token(options):
    embedding, batch = nn.Embedding(C, C), tokens()
    assert unit_of(lambda: of_tokens(batch, embedding, **options), batch) == "nats per token"


def test_a_report_of_losses_over_tokens_is_in_nats_per_token():
    embedding, batch = nn.Embedding(C, C), tokens()
    losses = lambda: of_tokens(batch, embedding, reduction="none").view(B, T).mean(1)  # noqa: E731
    assert unit_of(lambda: per_sample(losses()), batch) == "nats per token"


@pytest.mark.parametrize("heads", [1, 3])
def test_a_class_of_a_text_is_no_token(heads):
    embedding, batch = nn.Embedding(C, C), {**tokens(), "labels": torch.randint(0, C, (B,))}
    loss = lambda: sum(F.cross_entropy(embedding(batch["input_ids"]).mean(1), batch["labels"]) for _ in range(heads))  # noqa: E731
    assert unit_of(loss, batch) == "nats"


def test_labels_of_a_text_are_no_tokens():
    embedding, batch = nn.Embedding(C, C), {**tokens(), "labels": FLAGS}
    loss = lambda: F.binary_cross_entropy_with_logits(embedding(batch["input_ids"]).mean(1), batch["labels"])  # noqa: E731
    assert unit_of(loss, batch) == "nats"


def test_pixels_are_no_tokens():
    convolution, batch = nn.Conv2d(1, C, 1), {"x": torch.rand(B, 1, T, T), "y": torch.randint(0, C, (B, T, T))}
    assert unit_of(lambda: F.cross_entropy(convolution(batch["x"]), batch["y"]), batch) == "nats"


@pytest.mark.parametrize(("loss", "unit"), [("cross entropy", "nats"), ("mse", "ratio")])
def test_a_function_of_the_users_has_the_unit_of_the_step(loss, unit):
    """The losses by sample are not read from the step, but the step's own loss says what they are."""
    made = {**LIKELIHOODS, **SCALES}[loss]
    capture = StepCapture(loss=lambda batch, outputs: torch.rand(B))
    step(capture, made)
    assert capture.unit.unit == unit


def test_nothing_is_known_before_a_finite_loss():
    capture = StepCapture()
    assert capture.unit.unit is None
    step(capture, lambda: F.mse_loss(out(), TARGET * math.nan))
    assert capture.unit.unit is None
    step(capture, SCALES["mse"])
    assert capture.unit.unit == "ratio"


def test_a_loss_without_any_graph_is_judged_by_its_values():
    unit = LossUnit()
    unit.settle(torch.tensor([0.0, 2.0, math.inf, math.nan]))
    assert unit.unit == "ratio"
    unit.settle(torch.tensor([-1.0, 2.0]))
    assert unit.unit == "nats"
    assert scale_of_graph(None) is None


def test_negative_infinity_is_no_scale():
    assert not can_be_ratio(torch.tensor([1.0, -math.inf]))
    assert can_be_ratio(torch.tensor([0.0, math.nan]))
    assert can_be_ratio(torch.zeros(0))


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        ([], None),
        ([None, None], None),
        (["ratio", None], "ratio"),
        (["ratio", "ratio"], "ratio"),
        (["ratio", "nats"], "nats"),
        (["nats per token", "nats"], "nats"),
        (["nats per token", "ratio"], "nats"),
    ],
)
def test_processes_agree_on_one_unit(units, unit):
    assert joint_unit(units) == unit


def test_manual_optimization_adds_its_backwards():
    class Manual(nn.Module):
        automatic_optimization = False

    capture = StepCapture(Manual())
    batch = {"x": X, "y": Y, "t": TARGET}
    capture.begin(batch, B)
    for loss in (F.mse_loss(out(), TARGET), 0.001 * F.cross_entropy(out(), Y)):
        capture.before_backward(loss)
        loss.backward()
    assert isinstance(capture.finish(None, B), Captured)
    assert capture.unit.unit == "ratio"
