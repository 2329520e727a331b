"""Capture holds however training runs, changes nothing, and says so where it sees nothing."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_memsink.losses import step_reader
from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.per_sample import Captured, NotCaptured, per_sample
from tests.support.capturing import (
    CLASS_WEIGHT,
    QUIET,
    B,
    C,
    Model,
    T,
    against,
    check,
    flat,
    new,
    token_loss,
    watched,
)

pytestmark = QUIET


# How they run it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reduced_precision_tells_the_same_to_its_own_precision(precision):
    step = token_loss

    def oracle(model, batch):  # bf16 keeps 8 bits: a loss of 2 nats is known to 0.02
        return step(model.float(), batch)

    check(watched(new(step), oracle, precision=precision), tolerance=0.03)


class Checkpointed(Model):
    reentrant = False

    def hidden(self, x):
        return checkpoint(lambda h: torch.tanh(self.mix(h)), self.embed(x), use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("cls", [Checkpointed, Reentrant])
def test_a_checkpointed_model_is_read_like_any_other(cls):
    step = token_loss
    check(watched(new(step, cls), step))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss_is_watched_and_its_forward_runs_no_more_often(reentrant):
    """Reading it from the graph would run its forward again."""
    runs = []

    def head(model, hidden, y):
        runs.append(1)
        return F.cross_entropy(model.head(hidden).view(-1, C), y.view(-1))

    def step(model, batch):
        return checkpoint(head, model, model.hidden(batch["x"]), batch["y"], use_reentrant=reentrant)

    watched(new(step))
    assert len(runs) == 2 * 2 * 3, "forward and its repetition in backward, two runs of three steps"
    check(watched(new(step), token_loss))


class TwoOptimizers(Model):
    def __init__(self, step) -> None:
        super().__init__(step)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.mix, self.head)]

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (token_loss, against(F.mse_loss)), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss(self, batch))
        for optimizer in self.optimizers():
            optimizer.step()


def test_several_backwards_of_a_step_are_added():
    check(watched(new(None, TwoOptimizers), lambda m, b: token_loss(m, b) + against(F.mse_loss)(m, b)))


class Lbfgs(Model):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


def test_of_a_closure_run_again_only_the_first_counts():
    step = token_loss
    check(watched(new(step, Lbfgs), step))


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("validate", [False, True])
def test_a_loss_outside_a_compiled_model_is_read_at_once(backend, validate):
    compiled = {}

    def step(model, batch):
        fast = compiled.setdefault(id(model), torch.compile(model, backend=backend))
        return F.cross_entropy(fast(batch["x"]).view(-1, C), batch["y"].view(-1))

    torch._dynamo.reset()
    check(watched(new(step), token_loss, validate=validate))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_inside_a_compiled_step_is_watched(backend):
    torch._dynamo.reset()
    inner = torch.compile(token_loss, backend=backend)
    watch = watched(new(lambda m, b: inner(m, b)), token_loss, validate=True)
    check(watch, lost=int(backend != "eager"))


# What can't be read ------------------------------------------------------------------------------------------


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * (x**2).sum()

    @staticmethod
    def backward(ctx, gradient):
        return 4 * gradient * ctx.saved_tensors[0]


def masked_select(model, batch):
    mask = batch["y"] != -100
    return F.cross_entropy(model(batch["x"]).masked_select(mask[..., None]).view(-1, C), batch["y"][mask])


LOST = "Model.training_step has a loss whose rows can't be assigned to samples: "
END = (
    " End Model.training_step with `return per_sample(losses, ids)`, or give the losses by "
    "`memsink(loss=function(batch, outputs) -> [B])`."
)
UNREADABLE = {
    "custom": (lambda m, b: Fused.apply(m(b["x"])), "FusedBackward, which is not linear."),
    "no batch": (lambda m, b: F.mse_loss(m(b["x"]).mean((0, 1)), CLASS_WEIGHT), "a mean over the samples."),
    "a root": (lambda m, b: token_loss(m, b) ** 0.5, "PowBackward0, which is not linear."),
}


@pytest.mark.parametrize(("step", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_named_with_the_remedy(step, words):
    watch = watched(new(step))
    assert isinstance(watch.seen[-1], NotCaptured)
    assert watch.seen[-1].reason.startswith(LOST + words)
    assert watch.seen[-1].reason.endswith(END)


READABLE = {"likelihood": against(F.poisson_nll_loss), "picked": masked_select}


@pytest.mark.parametrize("step", READABLE.values(), ids=READABLE)
def test_a_loss_without_a_reader_of_its_own_is_read_from_its_mean(step):
    check(watched(new(step), step, validate=True))


def test_what_is_reported_wins():
    def step(model, batch):
        return per_sample(F.cross_entropy(*flat(model, batch), reduction="none").view(-1, T).sum(1))

    check(watched(new(step), lambda m, b: step(m, b)["loss"], validate=True))


def test_a_report_of_the_wrong_length_is_refused():
    watch = watched(new(lambda m, b: per_sample(m(b["x"])[:3].mean((1, 2)))))
    assert watch.seen[0].reason.startswith("Model.training_step reported 3 losses for a batch of 4 samples.")


def test_a_watched_step_tells_how_much_of_the_loss_is_explained(monkeypatch):
    monkeypatch.setattr(step_reader, "FIRST_STEPS", 1)
    whole = watched(new(token_loss))
    assert [seen.explained for seen in whole.seen] == [pytest.approx(1.0), None, None]
    penalized = watched(new(lambda m, b: token_loss(m, b) + 1.0 + m.mix.weight.square().sum()))
    assert 0 < penalized.seen[0].explained < 1


def test_no_graph_outlives_its_step():
    class Packed:
        def __init__(self, tensor):
            self.tensor = tensor

    packed = weakref.WeakSet()

    def pack(tensor):
        packed.add(box := Packed(tensor))
        return box

    capture = StepCapture()
    hidden = torch.randn(B, C, requires_grad=True)
    capture.begin({"x": hidden}, B)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = F.mse_loss(hidden.square(), torch.zeros(B, C))
    capture.before_backward(loss)
    loss.backward(retain_graph=True)
    seen = capture.finish(loss, B)
    assert packed
    del loss
    assert isinstance(seen, Captured)
    assert not packed
