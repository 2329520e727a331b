"""Layers and units in the report, in loggers and in W&B."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_memsink import memsink
from lightning_memsink.attribution.update_norms import block_of
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.localization.concentration import Concentration
from lightning_memsink.localization.history import EvaluationProfile, LocalizationHistory
from lightning_memsink.localization.sample_attribution import StepAttribution
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.reporting.layer_heat_map import layer_heat_map
from lightning_memsink.reporting.localization_summary import series, short_names, where
from lightning_memsink.reporting.loggers.wandb import SafeWandbLogger
from tests.support.small_runs import DeepLM, fit
from tests.support.wandb_reader import read_run

LAYERS = {f"gpt.h.{n}.mlp.down": 100 for n in range(3)}
BLOCKS = ["gpt.wte", "gpt.h.0", "gpt.h.1", "gpt.h.2"]
CONCENTRATED = Concentration(0.8, 12.0, 0.25, 0.6, 0.55, 0.65, 0.5, 0.01, 9)


def profile(step: int, memorized: list[float], concentration: Concentration | None = CONCENTRATED) -> EvaluationProfile:
    return EvaluationProfile(
        step,
        {"memorized": 4, "learned": 10},
        {"memorized": memorized, "learned": [0.5, 0.3, 0.2]},
        {"memorized": [0.1, 0.2, 0.3, 0.4], "learned": [0.4, 0.3, 0.2, 0.1]},
        [0.1, 0.2, 0.5, 0.3],
        [0.01, 0.02, 0.03, 0.125],
        concentration,
        {"memorized": -0.125, "learned": 0.25},
    )


def attribution(*rows: EvaluationProfile, sinks: Sinks | None = None) -> LocalizationHistory:
    made = LocalizationHistory(LAYERS, BLOCKS)
    made.rows, made.sinks = list(rows), sinks
    return made


def test_the_summary_names_layers_updates_concentration_and_units():
    units = {"gpt.h.2.mlp.down": torch.tensor([4, 7])}
    sinks = Sinks(units, {name: torch.ones(2) for name in units}, LAYERS, stability=(0.5, 0.005))
    lines = where(attribution(profile(20, [0.6, 0.3, 0.1]), profile(40, [0.2, 0.2, 0.6]), sinks=sinks))
    assert lines == [
        "Of the effect that hidden units have on memorized samples, 60 % is in layer 2, the largest share of 3 layers; "
        "for other samples it is 20 %.",
        "From step 20 to step 40 the share of layer 2 changed most, from 10 % to 60 %.",
        "The squared gradient norm of memorized samples differs most from that of other samples in wte: 10 % of it is "
        "there, and 40 % for other samples.",
        "Training updates are largest in h.1. The part of memorized samples in the gradient norm of all samples is "
        "largest in h.2: 12.5 %.",
        "The mean cosine of the gradients of memorized samples with that of the controls is -0.12 (learned 0.25).",
        "The effect on memorized samples is more concentrated than the effect on matched other samples: the top 1 % of "
        "units have 25.0 % of it, and its Gini coefficient is 0.80, compared with 0.60 (0.55 to 0.65) under permuted "
        "flags (p = 0.01, 9 memorized samples).",
        "Localized: 2 of 300 units. Chosen from two halves of the memorized samples, the units overlap by 50 % "
        "(Jaccard index; chance 0.5 %).",
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no training step was recorded before an evaluation"),
        (
            [EvaluationProfile(20, {"learned": 3}, {"learned": [1.0, 0, 0]}, {}, [], [], None, {})],
            "no memorized sample was in a recorded training step",
        ),
        ([profile(20, [1.0, 0, 0], None)], "can't be tested: too few memorized samples"),
    ],
    ids=["no row", "none memorized", "too few"],
)
def test_the_summary_says_what_is_unknown(rows, words):
    assert any(words in line for line in where(attribution(*rows)))


def test_a_test_that_is_not_significant_is_no_concentration():
    even = Concentration(0.6, 90.0, 0.02, 0.6, 0.5, 0.7, 0.6, 0.4, 9)
    lines = where(attribution(profile(20, [1.0, 0, 0], even)))
    assert any("not shown to be more concentrated than" in line for line in lines)


def test_depth_runs_from_the_first_layer_to_the_last():
    assert series(profile(20, [1.0, 0, 0]))["depth/memorized"] == 0
    assert series(profile(20, [0, 0, 1.0]))["depth/memorized"] == 1
    assert series(profile(20, [0, 1.0, 0]))["concentration/p"] == 0.01


def test_names_lose_what_all_have_in_common():
    assert short_names(list(LAYERS)) == ["0", "1", "2"]
    assert short_names(["mlp.2"]) == ["mlp.2"]
    assert short_names(["a.b", "a.b.c"]) == ["b", "b.c"]


def test_a_block_is_named_up_to_its_first_number():
    assert block_of("net.0.attention.2.weight") == "net.0"
    assert block_of("head.weight") == "head" and block_of("scale") == "scale"


def test_the_heat_map_has_a_panel_for_each_group_and_kind():
    made = attribution(profile(20, [0.6, 0.3, 0.1]), profile(40, [0.2, 0.2, 0.6]))
    figure = layer_heat_map(made.rows, list(made.units), made.blocks)
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert [axes.get_title() for axes in panels[:2]] == ["memorized samples", "learned samples"] and len(panels) == 4
    assert [label.get_text() for label in panels[2].get_yticklabels()] == ["wte", "h.0", "h.1", "h.2"]
    assert layer_heat_map([], [], []).axes, "a sentence instead of a picture"


def test_a_sample_whose_gradient_was_left_out_is_left_out():
    """A row of zeros would pull the shares of its group to zero."""
    ids, verdicts = torch.tensor([7, 8, 9]), torch.full((3,), int(Verdict.MEMORIZED))
    shares, norms = torch.rand(3, 300), torch.rand(3, 4)
    shares[1], norms[1] = 0, 0
    history, expected, rest = attribution(), attribution(), torch.tensor([True, False, True])
    step = StepAttribution(ids, shares, norms, torch.ones(3))
    history.record(step, verdicts)
    expected.record(step.select(rest), verdicts[rest])
    assert repr(history.state_dict()) == repr(expected.state_dict())
    history.record(step.select(~rest), verdicts[~rest])  # a batch without any other sample
    assert history.memorized.ids.tolist() == expected.memorized.ids.tolist()


def test_a_run_shows_it_in_every_logger_and_in_the_report(tmp_path, capsys):
    wandb, csv = SafeWandbLogger(save_dir=str(tmp_path), offline=True), CSVLogger(str(tmp_path))
    crew = memsink(localize=True, every=1, identity="content", k=4, path=tmp_path / "report.md")
    fit(crew, DeepLM(), logger=[wandb, csv])
    wandb.experiment.finish()
    run = read_run(tmp_path)
    last = [row for row in run.history if "memsink/layers/memorized.values" in row][-1]
    assert sum(last["memsink/layers/memorized.values"]) == pytest.approx(1, abs=1e-3)
    assert last["memsink/layers/memorized.bins"] == [0, 1, 2, 3]
    assert run.series("memsink/depth/memorized")
    assert any("memsink/layer_heat_map" in name for row in run.history for name in row)
    [metrics] = tmp_path.rglob("metrics.csv")
    assert "memsink/depth/memorized" in metrics.read_text().splitlines()[0]
    report = (tmp_path / "report.md").read_text()
    assert "## Where" in report and "layers.png" in report
    assert (tmp_path / "report_files" / "layers.png").stat().st_size > 5000
    assert not Sinks.load(tmp_path / "report_files" / "sinks.safetensors").empty
    assert "Where\n" in capsys.readouterr().out
