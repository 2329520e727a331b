"""The sample of weights by which a validation under others is noticed, and the hooks that read it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_memsink.callbacks.runtime.module_calls import FirstCalls, tensors_of
from lightning_memsink.callbacks.runtime.trained_weights import ELEMENTS, TrainedWeights, any_differs, elements


@pytest.mark.parametrize("shape", [(), (1,), (255,), (256,), (300,), (64, 64), (512, 768), (3, 5, 7, 11), (2**20,)])
def test_elements_are_spread_over_the_tensor(shape):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    sample = elements(tensor)
    assert sample.ndim == 1 and min(tensor.numel(), ELEMENTS // 3) <= len(sample) <= ELEMENTS
    assert sample.unique().tolist() == sample.tolist() and sample[0] == 0
    assert float(sample[-1]) >= 0.6 * (tensor.numel() - 1)
    if tensor.ndim > 1:
        assert len((sample % tensor.shape[-1]).unique()) == min(tensor.shape[-1], len(sample))


def test_elements_are_a_copy_of_any_kind_of_tensor():
    weight = torch.randn(8, 6, 3, 3)
    for other in (weight, weight.to(memory_format=torch.channels_last), weight.permute(3, 2, 1, 0), weight[::2]):
        before = elements(other)
        assert torch.equal(before, elements(other.contiguous()))
        other.add_(1)
        assert any_differs([(before, elements(other))])
    assert len(elements(torch.zeros(4, dtype=torch.complex64))) == 8
    for dtype in (torch.bfloat16, torch.float64, torch.uint8, torch.bool):
        assert elements(torch.ones(3, dtype=dtype)).tolist() == [1.0] * 3
    assert elements(torch.zeros(0)) is None
    assert elements(torch.zeros(3, device="meta")) is None
    assert elements(torch.zeros(3).to_sparse()) is None


def test_nan_is_equal_to_nan_and_a_shape_is_compared():
    nan, other = torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 2.0])
    assert not any_differs([]) and not any_differs([(nan, nan.clone()), (other, other.clone())])
    assert any_differs([(nan, nan), (nan, other)])
    assert any_differs([(nan, torch.zeros(3))])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.unused = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.mean = MeanMetric()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.norm(self.first(inputs)))


def test_tensors_are_parameters_and_floating_point_buffers():
    names = [name for name, _ in tensors_of(Net())]
    assert names == [
        *("first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        *("unused.weight", "unused.bias", "frozen.weight", "frozen.bias"),
    ]


def test_first_calls_are_noted_once_and_leave_no_hook():
    net, calls, noted = Net(), FirstCalls(), []
    calls.wait(net, lambda name, module: noted.append(name))
    for _ in range(3):
        net(torch.ones(2, 4))
    assert noted == ["first", "norm", "frozen"] == [*calls.called]
    calls.stop()
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_calls_of_training_are_those_with_a_graph_of_modules_that_train():
    net, calls = Net(), FirstCalls()
    calls.wait(net, lambda name, module: None, only_trained=True)
    with torch.no_grad():
        net(torch.ones(2, 4))
    net.eval()(torch.ones(2, 4))
    assert not calls.called
    net.train()(torch.ones(2, 4))
    assert [*calls.called] == ["first", "norm"]


def test_a_model_that_is_watched_can_be_copied_and_saved():
    net, weights = Net(), TrainedWeights()
    weights.watch_training(net)
    weights.remember(net)
    weights.watch_validation(net)
    copied, loaded = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for other in (copied, loaded):
        nn.init.zeros_(other.first.weight)
        other(torch.ones(2, 4))
    assert not weights.differ(), "copies were called, and the model was not"
    nn.init.zeros_(net.first.weight)
    assert not weights.are_back(net)
