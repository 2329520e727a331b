"""How provenance passes through sums, reductions and products, and rows through steps as people write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memsink.losses.provenance import Lost, Rows, compress, merge, owners_of_rows, reduce, rows
from lightning_memsink.losses.row_rules import changes_in_place, follow
from tests.support.following import Following, batch_rows

B, T, D = 4, 5, 6


def of(*values: int, axis: int = 0, ndim: int = 2) -> Rows:
    return rows([torch.tensor(values).reshape([-1 if place == axis else 1 for place in range(ndim)])])


def sole(provenance: Any) -> list[Any]:
    assert isinstance(provenance, Rows), provenance
    (owners,) = provenance.candidates
    return owners.tolist()


def test_owners_have_extent_one_where_they_are_constant():
    owners = torch.tensor([[0, 0], [1, 1]])
    assert compress(owners).tolist() == [[0], [1]]
    assert compress(torch.zeros(3, 0, 2, dtype=torch.long)).tolist() == [[[-1]]]


def test_constants_count_for_nothing():
    known = of(0, 1)
    assert merge([(None, (2, 3)), (known, (2, 1)), (None, ())], (2, 3)) is known
    assert merge([(None, (2, 3))], (2, 3)) is None


def test_rows_of_different_samples_are_lost():
    assert isinstance(merge([(of(0, 1), (2, 1)), (of(1, 0), (2, 1))], (2, 1)), Lost)


def test_two_images_of_a_list_are_different_samples():
    first, second = Rows((torch.tensor(0),)), Rows((torch.tensor(1),))
    assert isinstance(merge([(first, ()), (second, ())], ()), Lost)
    assert isinstance(merge([(first, ()), (of(0, 1, ndim=1), (2,))], (2,)), Lost)


def test_rows_of_no_sample_take_the_other_owner():
    assert sole(merge([(of(0, -1, 2), (3, 1)), (of(0, 1, -1), (3, 1))], (3, 1))) == [[0], [1], [2]]


def test_an_outer_combination_has_two_readings_and_a_reduction_keeps_one():
    both = merge([(of(0, 1, 2), (3, 1)), (of(0, 1, 2, axis=1), (1, 3))], (3, 3))
    assert isinstance(both, Rows)
    assert len(both.candidates) == 2
    assert owners_of_rows(both, (3, 3)) is None
    assert sole(reduce(both, (3, 3), [1])) == [0, 1, 2]
    assert sole(reduce(both, (3, 3), [0], keepdim=True)) == [[0, 1, 2]]
    assert isinstance(reduce(both, (3, 3), [0, 1]), Lost)


def test_a_reduction_counts_rows_of_no_sample_for_nothing():
    assert sole(reduce(of(2, 2, -1, ndim=1), (3,), [0])) == 2
    assert reduce(of(2, 1, -1, ndim=1), (3,), [0], reason="a test") == Lost("a test")


def test_a_statistic_of_the_batch_leaves_owners_as_they_are():
    statistic, known = Lost("a mean"), of(0, 1)
    assert merge([(known, (2, 3)), (statistic, (3,))], (2, 3)) is known
    assert merge([(known, (2, 3)), (statistic, (2, 1))], (2, 3)) is statistic
    image = Rows((torch.zeros(1, 1, dtype=torch.long),))
    assert merge([(image, (2, 3)), (statistic, ())], (2, 3)) is statistic


def test_owners_are_expanded_without_memory():
    expanded = owners_of_rows(of(0, 1), (2, 1000))
    assert expanded is not None
    assert (expanded.shape, expanded.stride()) == ((2, 1000), (1, 0))
    assert owners_of_rows(None, (2,)) is None
    assert owners_of_rows(Lost("a test"), (2,)) is None


# What follow says


def test_an_unknown_function_loses_rows_by_name():
    x = torch.randn(3, 3)
    result = follow(torch.cholesky_inverse, (x,), {}, x, lambda tensor: of(0, 1, 2))
    assert result == Lost("torch.cholesky_inverse, whose rows can't be followed")


def test_nothing_is_raised_for_odd_arguments():
    x, known = torch.randn(3, 2), of(0, 1, 2)
    for func, args in [
        (torch.cat, (x,)),
        (torch.sum, (x, "rows")),
        (torch.Tensor.view, ()),
        (torch.Tensor.permute, (x, 7)),
        (F.linear, (x,)),
        (torch.einsum, ("ab", x, x)),
    ]:
        assert isinstance(follow(func, (*args, [x]), None, x, lambda tensor: known), Lost), func


def test_a_function_of_somebody_else_is_not_taken_for_torchs():
    def relu(x: Tensor) -> Tensor:
        return x.flip(0)

    x = torch.randn(2, 1)
    assert isinstance(follow(relu, (x,), {}, relu(x), lambda tensor: of(0, 1)), Lost)


def test_calls_of_constants_have_no_provenance():
    x = torch.randn(3, 2)
    assert follow(torch.cholesky_inverse, (x, [x, {"y": x}]), {"z": x}, x, lambda tensor: None) is None


def test_results_that_hold_no_tensor_have_no_provenance():
    x = torch.randn(3, 2)
    for func, result in [(torch.Tensor.size, x.shape), (torch.Tensor.dim, 2), (torch.Tensor.tolist, x.tolist())]:
        assert follow(func, (x,), {}, result, lambda tensor: of(0, 1, 2)) is None


@pytest.mark.parametrize(
    "func",
    [
        torch.Tensor.add_,
        torch.Tensor.__iadd__,
        torch.Tensor.__setitem__,
        torch.Tensor.copy_,
        torch.Tensor.index_put_,
        torch.Tensor.masked_fill_,
        torch.Tensor.squeeze_,
        torch.Tensor.data.__set__,
        torch.relu_,
        F.relu_,
    ],
)
def test_functions_that_change_their_first_argument(func):
    assert changes_in_place(func)


@pytest.mark.parametrize(
    "func",
    [
        torch.Tensor.add,
        torch.Tensor.__add__,
        torch.Tensor.__getitem__,
        torch.Tensor.__invert__,
        torch.Tensor.int,
        torch.Tensor.data.__get__,
        torch.Tensor.requires_grad.__set__,
        torch.relu,
        torch.ops.aten.add.Tensor,
        F.linear,
    ],
)
def test_functions_that_do_not(func):
    assert not changes_in_place(func)


# Steps


class Step:
    """A step on a batch ``x`` ``[B, T, D]``, ``labels`` ``[B, T]`` and ``one`` label per sample ``[B]``."""

    def __init__(self, size: int = B) -> None:
        self.mode = Following()
        self.x = self.batch(torch.randn(size, T, D))
        self.z = self.batch(torch.randn(size, D))
        self.labels = self.batch(torch.randint(D, (size, T)))
        self.one = self.batch(torch.randint(D, (size,)))
        self.weight = torch.randn(D, D)

    def batch(self, tensor: Tensor, axis: int = 0) -> Tensor:
        return self.mode.give(tensor, batch_rows(tensor.shape[axis], tensor.ndim, axis))

    def of(self, tensor: Tensor) -> Any:
        owners = self.mode.owners(tensor)
        return self.mode.of(tensor) if owners is None else owners.tolist()


def repeated(times: int, size: int = B) -> list[int]:
    return [sample for sample in range(size) for _ in range(times)]


def test_tokens_of_sequences_batch_first_and_time_first():
    step = Step()
    with step.mode:
        logits = step.x @ step.weight
        flat = F.cross_entropy(logits.reshape(-1, D), step.labels.flatten(), reduction="none")
        time_first = logits.transpose(0, 1).reshape(-1, D)
        turned = F.cross_entropy(time_first, step.labels.T.reshape(-1), reduction="none")
        crossed = F.cross_entropy(time_first, step.labels.reshape(-1), reduction="none")
    assert step.of(flat) == repeated(T)
    assert step.of(turned) == [*range(B)] * T
    assert isinstance(step.of(crossed), Lost)


def test_as_many_samples_as_tokens_are_no_reason_to_guess():
    step = Step(size=T)
    with step.mode:
        time_first = step.x.transpose(0, 1).reshape(-1, D)
        losses = F.cross_entropy(time_first, step.labels.T.reshape(-1), reduction="none")
        crossed = F.cross_entropy(time_first, step.labels.reshape(-1), reduction="none")
    assert step.of(losses) == [*range(T)] * T
    assert isinstance(step.of(crossed), Lost)


def test_labels_shifted_and_padded():
    step = Step()
    with step.mode:
        shifted = F.pad(step.labels, (0, 1), value=-100)[..., 1:].contiguous()
        losses = F.cross_entropy(step.x.float().view(-1, D), shifted.view(-1), ignore_index=-100, reduction="none")
        picked = step.x[:, :-1][step.labels[:, 1:] > 2]
    assert step.of(losses) == repeated(T)
    expected = (step.labels[:, 1:] > 2).nonzero()[:, 0].tolist()
    assert [row[0] for row in step.of(picked)] == expected


def test_a_part_of_the_batch_by_its_losses():
    step = Step()
    with step.mode:
        losses = F.cross_entropy(step.z, step.one, reduction="none")
        hardest = losses.topk(2)
        again = losses[hardest.indices]
        above = losses[losses > losses.mean()]
    assert step.of(hardest.values) == hardest.indices.tolist() == step.of(again)
    assert step.of(above) == (losses > losses.mean()).nonzero()[:, 0].tolist()


def test_two_views_that_are_joined():
    step = Step()
    with step.mode:
        views = F.normalize(torch.cat([step.z, step.z * 2]), dim=1)
        similar = views @ views.T / 0.1
        similar = similar.masked_fill(torch.eye(2 * B, dtype=torch.bool), float("-inf"))
        target = torch.arange(2 * B).roll(B)
        losses = F.cross_entropy(similar, target, reduction="none")
        by_hand = torch.logsumexp(similar, 1) - similar[torch.arange(2 * B), target]
        interleaved = torch.stack([step.z, step.z], 1).flatten(0, 1).sum(1)
    assert step.of(losses) == step.of(by_hand) == [*range(B), *range(B)]
    assert step.of(interleaved) == repeated(2)


def test_supervised_contrast():
    step = Step()
    with step.mode:
        features = F.normalize(step.z, dim=1)
        logits = features @ features.T
        logits = logits - logits.max(1, keepdim=True).values.detach()
        positive = (step.one[:, None] == step.one[None]).float() * (1 - torch.eye(B))
        log_probability = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
        losses = -(positive * log_probability).sum(1) / positive.sum(1).clamp(min=1)
    assert step.of(losses) == [*range(B)]


def test_images_and_texts():
    step = Step()
    texts = step.batch(torch.randn(B, D))
    with step.mode:
        logits = step.z @ texts.t()
        images = F.cross_entropy(logits, torch.arange(B), reduction="none")
        captions = F.cross_entropy(logits.t(), torch.arange(B), reduction="none")
        both = (images + captions) / 2
        pairs = logits.diagonal()
    assert step.of(images) == step.of(captions) == step.of(both) == step.of(pairs) == [*range(B)]


def test_a_queue_of_negatives():
    step = Step()
    queue = torch.randn(7, D)
    with step.mode:
        positive = torch.einsum("nc,nc->n", step.z, step.z * 2).unsqueeze(-1)
        logits = torch.cat([positive, torch.einsum("nc,ck->nk", step.z, queue.T)], dim=1)
        losses = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long), reduction="none")
        everything = torch.cat([step.z, queue]).sum(1)
    assert step.of(losses) == [*range(B)]
    assert step.of(everything) == [*range(B), *[-1] * 7]


def test_chosen_and_rejected():
    step = Step()
    with step.mode:
        joined = torch.cat([step.x, step.x * 2])
        labels = torch.cat([step.labels, step.labels])
        logps = joined.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2).sum(-1)
        chosen, rejected = logps.split(B)
        losses = -F.logsigmoid(0.1 * (chosen - rejected))
        halves = logps[:B] - logps[B:]
        crossed = logps[:B] - logps[1 : B + 1]
    assert step.of(losses) == step.of(halves) == [*range(B)]
    assert isinstance(step.of(crossed), Lost)


def test_labels_picked_by_position():
    step = Step()
    with step.mode:
        logps = step.z.log_softmax(1)
        picked = logps[torch.arange(B), step.one]
        others = logps[torch.arange(B), step.one.flip(0)]
        gathered = logps.gather(1, step.one.roll(1)[:, None])
        hot = (F.one_hot(step.one, D) * logps).sum(1)
        focal = (1 - picked.exp()) ** 2 * -picked
    assert step.of(picked) == step.of(hot) == step.of(focal) == [*range(B)]
    assert isinstance(step.of(others), Lost)
    assert isinstance(step.of(gathered), Lost)


def test_mixed_samples_are_lost():
    step = Step()
    order = torch.tensor([2, 0, 3, 1])
    with step.mode:
        mixed = 0.7 * step.z + 0.3 * step.z[order]
        cut = step.x.clone()
        cut[:, 1:3] = step.x[order, 1:3]
        whole = cut.mean((1, 2))
        shuffled = step.z[order].sum(1)
    assert isinstance(step.of(mixed), Lost)
    assert isinstance(step.of(whole), Lost)
    assert step.of(shuffled) == order.tolist()


def test_mined_negatives_are_lost():
    step = Step()
    with step.mode:
        distance = torch.cdist(step.z, step.z)
        farthest = step.z[distance.argmax(1)]
        losses = F.triplet_margin_loss(step.z, step.z + 1, farthest, reduction="none")
    assert isinstance(step.of(losses), Lost)


def test_micro_batches():
    step = Step()
    with step.mode:
        losses = [
            F.cross_entropy(z, y, reduction="none") for z, y in zip(step.z.chunk(2), step.one.chunk(2), strict=True)
        ]
        joined = torch.cat(losses)
        means = torch.stack([each.mean() for each in losses])
        alone = [F.cross_entropy(z, y) for z, y in zip(step.z.split(1), step.one.split(1), strict=True)]
    assert step.of(joined) == [*range(B)]
    assert isinstance(step.of(means), Lost)
    assert [step.of(each) for each in alone] == [*range(B)]


def test_a_list_of_samples():
    mode = Following()
    images = [torch.randn(3, 4 + number, 5) for number in range(3)]
    for number, image in enumerate(images):
        mode.give(image, torch.tensor(number).reshape(1, 1, 1))
    with mode:
        padded = torch.zeros(3, 3, 8, 8)
        for number, image in enumerate(images):
            padded[number, :, : image.shape[1], : image.shape[2]] = image
        features = F.conv2d(padded, torch.randn(2, 3, 3, 3)).mean((1, 2, 3))
        sequences = torch.nn.utils.rnn.pad_sequence([image.mean((0, 2)) for image in images], batch_first=True).sum(1)
        stacked = torch.stack([image.mean() for image in images])
        total = stacked.sum()
        running = 0
        for image in images:
            running = running + image.mean()
    for rows_of_images in (features, sequences, stacked):
        owners = mode.owners(rows_of_images)
        assert owners is not None
        assert owners.tolist() == [0, 1, 2]
    assert isinstance(mode.of(total), Lost)
    assert isinstance(mode.of(running), Lost)


def test_graphs_in_one_batch():
    mode = Following()
    graph = torch.tensor([0, 0, 1, 1, 1, 2])
    nodes, edges = mode.give(torch.randn(6, 4), graph[:, None]), torch.tensor([[0, 1, 2, 4], [1, 0, 3, 2]])
    with mode:
        messages = nodes[edges[0]]
        received = torch.zeros(6, 4).index_add_(0, edges[1], messages) + nodes
        pooled = torch.zeros(3, 4).scatter_add_(0, graph[:, None].expand(-1, 4), received)
        means = pooled / torch.bincount(graph)[:, None]
        leaking = torch.zeros(6, 4).index_add_(0, torch.tensor([0, 0, 0, 0]), messages)
    owners = mode.owners(means)
    assert owners is not None
    assert owners[:, 0].tolist() == [0, 1, 2]
    assert isinstance(mode.of(leaking), Lost)


def test_noise_and_schedules():
    step = Step()
    schedule = torch.linspace(0, 1, 10)
    with step.mode:
        times = torch.randint(0, 10, (B,))
        scale = schedule[times][:, None]
        noise = torch.randn_like(step.z)
        noisy = scale * step.z + (1 - scale) * noise
        losses = F.mse_loss(noisy, noise, reduction="none").mean(1)
        mean, spread = step.z.chunk(2, dim=1)
        divergence = -0.5 * (1 + spread - mean**2 - spread.exp()).sum(1)
    assert step.of(losses) == step.of(divergence) == [*range(B)]


def test_statistics_of_the_batch():
    step = Step()
    with step.mode:
        centred = (step.z - step.z.mean(0)) / step.z.std(0)
        normal = F.batch_norm(step.z, None, None, training=True)
        weighed = (step.z.pow(2).sum(1) / step.z.pow(2).sum()).exp()
        centred, normal = centred.sum(1), normal.sum(1)
    assert step.of(centred) == step.of(normal) == step.of(weighed) == [*range(B)]


def test_writing_a_constant_forgets_a_buffers_rows():
    step = Step()
    with step.mode:
        buffer = torch.zeros(B, D)
        buffer.copy_(step.z)
        filled = buffer.clone().zero_()
        buffer[0] = 0
        buffer += 1
    assert step.of(filled) is None
    assert [row[0] for row in step.of(buffer)] == [*range(B)]


def test_a_batch_of_one_is_that_samples():
    step = Step(size=1)
    with step.mode:
        loss = F.cross_entropy(step.z, step.one)
        queue = torch.cat([step.z, torch.randn(2, D)]).sum(1)
    assert step.of(loss) == 0
    assert step.of(queue) == [0, -1, -1]


def test_regions_of_images_are_their_images():
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("roi_align(Tensor input, Tensor rois, float scale, int height, int width) -> Tensor")
    library.impl("roi_align", lambda images, boxes, scale, height, width: images.new_zeros(len(boxes), 2, 3, 3), "CPU")
    mode = Following()
    images = mode.give(torch.randn(3, 2, 8, 8), batch_rows(3, 4))
    boxes = torch.tensor([[2.0, 0, 0, 4, 4], [0, 0, 0, 4, 4], [2, 1, 1, 5, 5]])
    with mode:
        regions = torch.ops.torchvision.roi_align(images, boxes, 1.0, 3, 3)
    owners = mode.owners(regions)
    assert owners is not None
    assert owners[:, 0, 0, 0].tolist() == [2, 0, 2]
    library._destroy()
