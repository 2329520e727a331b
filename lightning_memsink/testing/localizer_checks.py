"""Rules that every localizer of lightning_memsink keeps, as checks of any function. Each raises AssertionError."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.localization.evaluation import evaluate_injection, injected
from lightning_memsink.localization.localizers import Batch, Localizer, Scores, Task
from lightning_memsink.testing.failures import failure
from lightning_memsink.testing.small_run import difference, quiet, random_state, seed_everything
from lightning_memsink.testing.traces import module_traces

UNITS, CLASSES, INJECTIONS = 24, 6, 5


class TwoLayers(nn.Module):
    """Two hidden layers, with dropout and a norm that keeps statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, UNITS), nn.GELU(), nn.Linear(UNITS, 5))
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.second = nn.Sequential(nn.Linear(5, UNITS), nn.GELU(), nn.Linear(UNITS, CLASSES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(self.dropout(self.norm(inputs + self.first(inputs))))
        return output


def small_task(seed: int = 0) -> Task:
    """Two batches of targets and one of controls of an untrained `TwoLayers`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoLayers()
        batches = [Batch((torch.randn(size, 5), torch.randint(CLASSES, (size,))), size) for size in (2, 1, 6)]
    layers = find_hidden_layers(model)
    return Task(model, layers, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches[:2], batches[2:])


def check_every_layer_is_scored(localizer: Localizer) -> None:
    """Scores are finite, ``[U]`` for each hidden layer and no other, and hold no graph."""
    task = small_task()
    scores = _scores(localizer, task)
    expected = {layer.name: [layer.units] for layer in task.layers}
    found = {name: list(own.shape) for name, own in scores.items()}
    wrong = [name for name, own in scores.items() if not own.isfinite().all() or own.requires_grad]
    if found != expected or wrong:
        raise failure(
            "Every hidden layer is scored",
            _name(localizer),
            f"shapes {found}" + (f"; not finite or with a graph: {', '.join(wrong)}" if wrong else ""),
            f"finite scores without a graph, of shapes {expected}",
            "Return {layer.name: scores.detach()} for each of `task.layers`.",
        )


def check_scores_are_deterministic(localizer: Localizer) -> None:
    """The same task gives the same scores, whatever the state of the global random generators."""
    seed_everything()
    first = _scores(localizer, small_task())
    torch.rand(1)
    changed = difference(dict(_scores(localizer, small_task())), dict(first))
    if changed is not None:
        raise failure(
            "Scores are deterministic",
            _name(localizer),
            f"a second call differs at {changed}",
            "the same scores, to the bit",
            "Draw from a generator of your own, torch.Generator().manual_seed(seed), with the seed as an argument.",
        )


def check_model_is_unchanged(localizer: Localizer) -> None:
    """Weights, buffers, gradients, modes, hooks and global random generators are as before, to the bit."""
    task = small_task()
    task.model.get_submodule("second").eval()
    for parameter in task.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(task.model.parameters()).requires_grad_(False)
    before, traces = _everything(task.model), module_traces(task.model)
    _scores(localizer, task)
    left = ", ".join(sorted(module_traces(task.model) ^ traces))
    changed = left or difference(_everything(task.model), before)
    if changed:
        raise failure(
            "The model is left as it was",
            _name(localizer),
            changed,
            "weights, buffers, gradients, modes, hooks and random generators as before the call",
            "Restore modes, draw within torch.random.fork_rng(), take gradients by torch.autograd.grad, and remove "
            "hooks in `finally`.",
        )


def check_injected_units_are_found(localizer: Localizer) -> None:
    """Units that alone were trained on the targets are found more often than by chance (three standard errors)."""
    recalls, chance, count = [], 0.0, 0
    for seed in range(INJECTIONS):
        task = small_task(seed)
        with quiet(), injected(task, fraction=0.2, until=0.3, steps=100, lr=0.1, longest=2.0, seed=seed) as injection:
            result = evaluate_injection(localizer, task, injection)
        recalls.append(result.recall)
        chance, count = result.chance, injection.count
    mean = sum(recalls) / INJECTIONS
    # Hits of one injection are hypergeometric: `count` draws from units of which a share `chance` is injected.
    sigma = (chance * (1 - chance) ** 2 / (count * INJECTIONS)) ** 0.5
    if mean < chance + 3 * sigma:
        raise failure(
            "Injected units are found",
            _name(localizer),
            f"a mean recall of {mean:.2f} in {INJECTIONS} injections of {count} units",
            f"more than {chance + 3 * sigma:.2f}; chance is {chance:.2f}",
            "Score a unit higher the more it lowers the loss of `task.targets`. A baseline is checked with "
            "check_localizer(localizer, baseline=True).",
        )


CHECKS: Sequence[Callable[[Localizer], None]] = (
    check_every_layer_is_scored,
    check_scores_are_deterministic,
    check_model_is_unchanged,
)
"""Those of every localizer, baselines included."""


def _name(localizer: Localizer) -> str:
    function = getattr(localizer, "func", localizer)  # of a partial
    return getattr(function, "__name__", type(function).__name__)


def _scores(localizer: Localizer, task: Task) -> Scores:
    with quiet():
        return localizer(task)


def _everything(model: nn.Module) -> dict[str, object]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = copy.deepcopy({"weights": dict(model.state_dict()), "gradients": gradients})
    return {**values, "random state": random_state()}
