"""Sketches keep inner products on average, and cost no sample another's gradient."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from lightning_memsink.attribution.gradient_sketches import GradientSketches, cosine, projection, sketch


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def sketches_of(recorder: GradientSketches, model: nn.Module, tokens: torch.Tensor, **options: torch.Tensor):
    recorder.open()
    model(tokens).square().mean().backward()
    return recorder.finish(len(tokens), **options)


TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(1))


def test_inner_products_are_right_on_average():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 3, 4, generator=generator)
    gradients = torch.bmm(left.mT, right).flatten(1)
    products = [
        s @ s.T
        for seed in range(4000)
        for s in [sketch(left, right, projection(6, 4, 2 * seed), projection(4, 4, 2 * seed + 1))]
    ]
    assert_close(torch.stack(products).mean(0), gradients @ gradients.T, rtol=0.05, atol=0.5)


def test_a_batch_gives_the_sketches_of_its_samples_alone():
    model = network()
    recorder = GradientSketches(model, rank=3)
    together = sketches_of(recorder, model, TOKENS, weights=torch.full((4,), 0.25))
    alone = torch.cat([sketches_of(recorder, model, row[None]) for row in TOKENS])
    assert together.shape == (4, 2 * 9) and recorder.layers == ["1", "3"]
    assert_close(together, alone)


def test_projections_follow_the_seed_and_never_the_global_generator():
    model, states = network(), []
    for seed in (0, 0, 1):
        torch.manual_seed(7 * len(states))
        before = torch.get_rng_state()
        states.append(sketches_of(GradientSketches(model, seed=seed), model, TOKENS))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_wide_enough_sketch_has_the_cosines_of_the_gradients():
    model = network()
    sketched = sketches_of(GradientSketches(model, rank=64), model, TOKENS)
    gradients = []
    for row in TOKENS:
        model.zero_grad()
        model(row[None]).square().mean().backward()
        gradients.append(torch.cat([model[at].weight.grad.flatten() for at in (1, 3)]))
    oracle = torch.stack(gradients)
    assert_close(
        cosine(sketched, sketched.mean(0)),
        torch.cosine_similarity(oracle, oracle.mean(0, keepdim=True)),
        rtol=0.1,
        atol=0.1,
    )


def test_cosines_lie_between_minus_one_and_one_and_are_zero_without_a_gradient():
    control = torch.tensor([1.0, 0.0])
    sketches = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert cosine(sketches, control).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert cosine(sketches, torch.zeros(2)).tolist() == [0.0] * 4


def test_a_sample_of_no_weight_and_a_frozen_layer_have_no_sketch():
    model = network()
    model[1].requires_grad_(False)
    recorder = GradientSketches(model, rank=2)
    sketched = sketches_of(recorder, model, TOKENS, weights=torch.tensor([0.25, 0.25, 0.0, 0.25]))
    assert recorder.layers == ["3"] and not sketched[2].any() and sketched[1].any()
    recorder.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)
