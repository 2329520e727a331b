"""A ledger in a checkpoint that can't be read: refused with what to do, and what to do works."""

import pytest
import torch
from lightning.pytorch import Callback

import lightning_memsink
from lightning_memsink import SampleGradientMask, memsink
from lightning_memsink.callbacks.runtime.checkpointing import leave_out
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import TRAIN, TinyLM, fit

REMEDY = r"begin a new ledger with memsink\(new_ledger=True\) or LossTracker\(new_ledger=True\): weights"


def crew(**options):
    return memsink(SampleGradientMask(at=0.2, k=4), localize=True, identity="content", path=None, k=4, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "two epochs.ckpt"
    fit(crew(), max_epochs=2)[0].save_checkpoint(path)
    return torch.load(path, weights_only=True)


def resume(state, folder, **options):
    torch.save(state, folder / "damaged.ckpt")
    return fit(crew(**options), TinyLM(seed=1), ckpt_path=str(folder / "damaged.ckpt"))[0]


def older(states):
    states["LossTracker"]["table"]["schema"] = 0


def newer(states):
    states["LossTracker"]["table"]["schema"] = 99


def another_column(states):
    states["LossTracker"]["table"]["columns"]["colour"] = torch.zeros(1)


def truncated(states):
    columns = states["LossTracker"]["table"]["columns"]
    columns["last_loss"] = columns["last_loss"][:-5]


def twice(states):
    states["LossTracker"]["table"]["ids"][1] = states["LossTracker"]["table"]["ids"][0]


def of_another_kind(states):
    columns = states["LossTracker"]["table"]["columns"]
    columns["exposures"] = columns["exposures"].double()


def no_controls(states):
    del states["LossTracker"]["controls"]


def verdicts_of_a_newer_version(states):
    states["MemorizationDetector"]["flags"]["evaluations"][0]["mood"] = 1.0


def verdicts_of_another_ledger(states):
    del states["LossTracker"]


def no_actions(states):
    del states["SampleGradientMask"]["actions"]


def no_window(states):
    del states["SinkLocalizer"]["window"]


def no_history(states):
    del states["LiveCurves"]["history"]


DAMAGES = {
    older: r"ledger of schema 0; this version reads schema 1",
    newer: r"ledger of schema 99; this version reads schema 1",
    another_column: r"ledger is damaged: it has the columns .*colour",
    truncated: r"ledger is damaged: column last_loss is torch.float32 \[\d+\] for \d+ samples",
    twice: r"ledger is damaged: \d+ rows have \d+ different ids",
    of_another_kind: r"ledger is damaged: column exposures is torch.float64",
    no_controls: r"a state of LossTracker that this version can't read \(KeyError: 'controls'\)",
    verdicts_of_a_newer_version: r"a state of MemorizationDetector that this version can't read .*mood",
    verdicts_of_another_ledger: r"verdicts on \d+ samples, but LossTracker has 0",
    no_actions: r"a state of SampleGradientMask that this version can't read",
    no_window: r"a state of SinkLocalizer that this version can't read",
    no_history: r"a state of LiveCurves that this version can't read",
}


def copied(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return type(state)((key, copied(value)) for key, value in state.items())
    return [copied(value) for value in state] if isinstance(state, list) else state


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_ledger_is_refused_before_the_first_step_and_a_new_one_can_be_begun(damage, checkpoint, tmp_path):
    state = copied(checkpoint)
    damage(state["callbacks"])
    with pytest.raises(ValueError, match=rf"{DAMAGES[damage]}.*{REMEDY}"):
        resume(state, tmp_path)
    run = resume(state, tmp_path, new_ledger=True)
    ledger = Ledger.of(run)
    assert run.global_step == 63, "the third epoch only: progress was resumed"
    assert int(ledger.losses.exposures.sum()) == len(TRAIN)
    assert min(evaluation.step for evaluation in ledger.flags.evaluations) > 42
    assert min(row["step"] for row in ledger.history) > 42


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_weights_and_optimizer_are_resumed_under_a_new_ledger(checkpoint, tmp_path):
    """Watching only, so that nothing of the ledger reaches the weights."""
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    found = []
    for watching in ([], memsink(identity="content", path=None, new_ledger=True)):
        _, module = fit(watching, TinyLM(seed=1), ckpt_path=str(tmp_path / "whole.ckpt"))
        found.append(module.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_without_the_option_the_ledger_goes_on(checkpoint, tmp_path):
    run = resume(copied(checkpoint), tmp_path)
    assert int(Ledger.of(run).losses.exposures.sum()) == 3 * len(TRAIN)


# Which states a new ledger leaves out ---------------------------------------------------------------------------------

WITH_STATE = [
    kind
    for kind in (getattr(lightning_memsink, name) for name in lightning_memsink.__all__)
    if isinstance(kind, type) and issubclass(kind, Callback) and kind.state_dict is not Callback.state_dict
]


@pytest.mark.parametrize("kind", WITH_STATE)
def test_every_callback_with_a_state_declares_whether_it_refers_to_samples(kind):
    """In its own class, so that a new one can't be forgotten by inheriting an answer."""
    assert vars(kind).get("saves_samples") in (True, False)


def numbers_in(state):
    if isinstance(state, torch.Tensor):
        return {int(number) for number in state.flatten().tolist()} if state.dtype == torch.int64 else set()
    if isinstance(state, dict):
        return {number for pair in state.items() for each in pair for number in numbers_in(each)}
    if isinstance(state, list | tuple | set):
        return {number for each in state for number in numbers_in(each)}
    return {state} if isinstance(state, int) else set()


def test_a_state_with_sample_ids_is_declared_and_left_out(tmp_path):
    """Ids are 64-bit hashes of the content here: no other number of a state is equal to one by chance."""
    more = [
        lightning_memsink.MemSinks(),
        lightning_memsink.SinkDropout(who="all"),
        lightning_memsink.SinkGradientMask(strength=0.1),
        lightning_memsink.Goldfish(context=3),
        lightning_memsink.LossTruncation(window=50),
    ]
    callbacks = [*crew(), SampleGradientMask("skip"), *more]
    callbacks = [each for n, each in enumerate(callbacks) if type(each) not in map(type, callbacks[n + 1 :])]
    run = fit(callbacks, max_epochs=2)[0]
    ids = set(Ledger.of(run).losses.ids.tolist())
    ours = [each for each in callbacks if type(each) in WITH_STATE]
    with_ids = {type(each).__name__ for each in ours if numbers_in(each.state_dict()) & ids}
    assert {"LossTracker"} <= with_ids <= {type(each).__name__ for each in ours if each.saves_samples}
    checkpoint = {"callbacks": {each.state_key: {} for each in callbacks}}
    leave_out(checkpoint, callbacks)
    assert set(checkpoint["callbacks"]) == {
        each.state_key for each in callbacks if not getattr(each, "saves_samples", 0)
    }
