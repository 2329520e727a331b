"""Sinks as a value: their table, plot and validation, and that a file restores them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lightning_memsink.localization.sinks import Sinks


def some_sinks(**others):
    return Sinks(
        units={"h.0.mlp": torch.tensor([3, 1]), "h.1.mlp": torch.tensor([7])},
        scores={"h.0.mlp": torch.tensor([0.5, 0.2]), "h.1.mlp": torch.tensor([0.3])},
        sizes={"h.0.mlp": 4, "h.1.mlp": 8, "h.2.mlp": 8},
        **({"method": "activation x gradient", "stability": (0.5, 0.02)} | others),
    )


def test_a_file_gives_back_what_was_saved(tmp_path):
    some_sinks().save(tmp_path / "sinks.safetensors")
    back = Sinks.load(tmp_path / "sinks.safetensors")
    assert list(back.units) == ["h.0.mlp", "h.1.mlp"]
    for name, units in some_sinks().units.items():
        assert_close(back.units[name], units)
        assert_close(back.scores[name], some_sinks().scores[name])
    assert (back.sizes, back.method, back.stability) == (some_sinks().sizes, "activation x gradient", (0.5, 0.02))
    assert [file.name for file in tmp_path.iterdir()] == ["sinks.safetensors"]


def test_empty_sinks_survive_a_file(tmp_path):
    Sinks().save(tmp_path / "none")
    assert Sinks.load(tmp_path / "none").empty


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "sinks.safetensors"
    some_sinks().save(path)
    before = path.read_bytes()

    def fails(*paths):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        Sinks().save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "Found no sinks at"),
        (lambda path: path.write_bytes(b"what is this"), ValueError, "is no safetensors file"),
        (lambda path: save_file({"weight": torch.ones(1)}, path), ValueError, "holds no sinks: weight"),
        (
            lambda path: save_file({}, path, {"lightning_memsink.sinks": json.dumps({"schema": 99})}),
            ValueError,
            "sinks of schema 99, and this version reads schema 1",
        ),
    ],
    ids=["none", "other file", "other tensors", "other schema"],
)
def test_a_file_without_sinks_is_refused(tmp_path, write, error, message):
    write(tmp_path / "file")
    with pytest.raises(error, match=message):
        Sinks.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("units", "scores", "message"),
    [
        ({"a": torch.tensor([4])}, {"a": torch.tensor([1.0])}, "has units 0…3"),
        ({"a": torch.tensor([0])}, {"a": torch.tensor([1.0, 2.0])}, "units are int64"),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([1.0])}, "units are int64"),
        ({"b": torch.tensor([0])}, {"b": torch.tensor([1.0])}, "the same layers"),
    ],
)
def test_sinks_that_contradict_themselves_are_refused(units, scores, message):
    with pytest.raises(ValueError, match=message):
        Sinks(units, scores, {"a": 4})


def test_masks_and_fraction_count_every_layer_that_was_searched():
    sinks = some_sinks()
    assert {name: mask.nonzero().flatten().tolist() for name, mask in sinks.masks().items()} == {
        "h.0.mlp": [1, 3],
        "h.1.mlp": [7],
        "h.2.mlp": [],
    }
    assert sinks.fraction == 3 / 20 and len(sinks) == 3 and not sinks.empty


@pytest.mark.parametrize(("count", "left"), [(0, [[], []]), (1, [[3], []]), (2, [[3], [7]]), (3, [[3, 1], [7]])])
def test_top_keeps_the_highest_scores_of_all_layers(count, left):
    assert [units.tolist() for units in some_sinks().top(count).units.values()] == left


@pytest.mark.parametrize(
    ("stability", "message"), [((0.5, 0.02), "agree on 50 % (chance 2.0 %)"), (None, "stability unknown")]
)
def test_the_table_names_layers_units_and_stability(stability, message):
    text = str(some_sinks(stability=stability))
    assert message in text and "h.2.mlp" in text and "3, 1" in text and "15 % of units" in text


def test_the_plot_has_a_bar_for_every_layer_searched():
    axes = some_sinks().plot().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.125, 0.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["h.0.mlp", "h.1.mlp", "h.2.mlp"]
