"""The loss table against a dictionary of lists."""

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memsink.samples.id_index import IdIndex
from lightning_memsink.samples.loss_table import LossTable

ids_anywhere = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)
visits = st.lists(
    st.tuples(st.integers(-3, 3), st.one_of(st.floats(0, 10, width=32), st.sampled_from([float("nan"), float("inf")]))),
    min_size=1,
    max_size=60,
)


@given(blocks=st.lists(ids_anywhere, max_size=6))
def test_rows_are_given_in_order_of_first_sight(blocks):
    index, expected = IdIndex(), {}
    for block in blocks:
        rows = index.intern(torch.tensor(block, dtype=torch.int64))
        for sample in block:
            expected.setdefault(sample, len(expected))
        assert rows.tolist() == [expected[sample] for sample in block]
    assert index.ids().tolist() == list(expected)


def test_an_index_that_grew_past_its_small_run_still_finds_everything():
    index = IdIndex()
    ids = torch.randperm(20_000, generator=torch.Generator().manual_seed(0)) * 7919 - 10_000
    for block in ids.split(999):
        index.intern(block)
    assert index.find(ids).tolist() == list(range(20_000))
    assert index.find(torch.tensor([3])).tolist() == [-1]


@given(history=visits, cuts=st.sets(st.integers(1, 59)), reference=st.integers(0, 60))
def test_columns_hold_what_a_list_per_sample_would(history, cuts, reference):
    """However the visits are cut into blocks."""
    table = LossTable(depth=3)
    table.reference_step = reference
    bounds = [0, *sorted(cut for cut in cuts if cut < len(history)), len(history)]
    for start, end in itertools.pairwise(bounds):
        ids, losses = (torch.tensor(column) for column in zip(*history[start:end], strict=True))
        table.record(ids, losses, torch.arange(start, end), torch.ones(len(ids)))
    for row, sample in enumerate(table.ids.tolist()):
        mine = [(step, loss) for step, (who, loss) in enumerate(history) if who == sample]
        finite = [(step, loss) for step, loss in mine if loss == loss and loss != float("inf")]
        late = [visit for visit in finite if visit[0] >= reference]
        assert table.exposures[row] == len(mine)
        for which, visit in (("first", finite[:1]), ("last", finite[-1:]), ("early", late[:1])):
            expected = visit[0] if visit else (-1, float("nan"))
            found = (getattr(table, f"{which}_step")[row].item(), getattr(table, f"{which}_loss")[row].item())
            assert found == pytest.approx(expected, rel=5e-3, nan_ok=True)
        recent = [loss for _, loss in finite[::-1][:3]]
        recent += [float("nan")] * (3 - len(recent))
        assert table.recent[row].tolist() == pytest.approx(recent, rel=5e-3, nan_ok=True)


def test_a_saved_table_goes_on_as_if_never_saved():
    """Through a file that is read with weights_only=True, as Lightning reads checkpoints."""
    table = LossTable()
    block = (torch.tensor([5, -7, 5]), torch.rand(3), torch.tensor([0, 1, 2]), torch.ones(3))
    table.describe(table.record(*block), torch.rand(3, 2))
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    restored = LossTable()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for one in (table, restored):
        one.record(torch.tensor([8, 5]), torch.tensor([1.0, 2.0]), torch.tensor([3, 4]), torch.ones(2))
    assert torch.equal(table.ids, restored.ids)
    for name in ("exposures", "first_loss", "last_loss", "last_step", "early_step", "recent", "features"):
        torch.testing.assert_close(getattr(table, name), getattr(restored, name), equal_nan=True, rtol=0, atol=0)


def test_a_ledger_of_another_schema_is_refused_by_name():
    with pytest.raises(ValueError, match=r"memsink ledger of schema 0; this version reads schema 1.*new_ledger=True"):
        LossTable().load_state_dict({"schema": 0})


def test_a_million_samples_fit_in_64_bytes_each():
    """Ids and columns; the detector's own columns counted with them."""
    from lightning_memsink.detection.verdicts import Flags

    table, many = LossTable(), 1_000_000
    for ids in (torch.arange(many) * 7919).split(50_000):
        rows = table.record(ids, torch.rand(len(ids)), torch.zeros(len(ids)), torch.ones(len(ids)))
        table.describe(rows, torch.rand(len(ids), 4))
    flags = Flags()
    flags.grow(many)
    assert table.nbytes + flags.nbytes <= 64 * many
