"""Audits of a finished model: results, and refusals of bad input."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lightning_memsink.cli import main
from lightning_memsink.extraction.audit.answer_cache import AnswersFile
from lightning_memsink.extraction.audit.audit import audit
from lightning_memsink.extraction.audit.config import AuditConfig
from lightning_memsink.extraction.audit.model_loading import load
from lightning_memsink.extraction.audit.texts import Text, encode, read_texts
from lightning_memsink.extraction.audit.top_texts import examine_top_texts
from lightning_memsink.localization.sinks import Sinks

WORDS, LENGTH, PREFIX = 40, 20, 6


def some_texts(many, seed):
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(f"w{word}" for word in row) for row in torch.randint(WORDS, (many, LENGTH), generator=generator)]


def write(path, texts, group):
    path.write_text("".join(json.dumps({"text": text, "group": group}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has memorized eight texts and saw eight others rarely; suspected texts, controls."""
    folder = tmp_path_factory.mktemp("audited")
    words = {f"w{word}": word for word in range(WORDS)} | {"[UNK]": WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    often, rarely, controls = some_texts(8, 0), some_texts(8, 1), some_texts(48, 2)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS + 1, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = torch.tensor([tokenizer.encode(text).ids for text in [*often, *rarely]])
    for step in range(150):
        shown = rows if step % 50 == 0 else rows[:8]
        optimizer.zero_grad()
        model(input_ids=shown, labels=shown).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "model")
    write(folder / "suspects.jsonl", often, "x150")
    with (folder / "suspects.jsonl").open("a") as file:
        file.write("".join(json.dumps({"text": text, "group": "x3"}) + "\n" for text in rarely))
    write(folder / "controls.jsonl", controls, "never")
    return folder


def command(folder, out, **changed):
    options = {
        "model": folder / "model",
        "suspects": folder / "suspects.jsonl",
        "controls": folder / "controls.jsonl",
        "out": out,
        "probe.prefix": PREFIX,
        "probe.length": LENGTH,
    } | changed
    return ["audit", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def report_folder(folder):
    main(command(folder, folder / "out"))
    return folder / "out"


def test_memorized_texts_are_found(report_folder):
    numbers = json.loads((report_folder / "report.json").read_text())["numbers"]
    assert numbers["extraction"] == {"asked": 16, "exact": 8, "discoverable": 8}
    assert 8 <= numbers["flagged"] <= 16
    assert numbers["separation"]["loss"]["auroc"] > 0.9
    assert numbers["separation"]["min-k%++"]["auroc_low"] > 0.5


def test_the_report_says_so_in_words(report_folder):
    page = (report_folder / "report.md").read_text()
    assert "**Was memorization measured?** Yes. 16 suspected texts against 48 controls." in page
    assert "**Can any be extracted?** Yes. 8 of 16 come word for word" in page
    assert re.search(r"\| x150 \(suspected\) \| 8 \| 8 \| 8 \| 8 \| 100 % \|", page)
    assert re.search(r"\| never \(control\) \| 48 \| 48 \| 0 \| 0 \|", page)
    assert not any(f"w{word} w" in page for word in range(WORDS))  # no raw text


def test_an_interrupted_audit_resumes_where_it_stopped(folder, tmp_path, monkeypatch):
    main(command(folder, tmp_path / "whole"))
    before = []

    class Killed(Exception):
        pass

    def killed(self, answers):
        if len(before) > 2:
            raise Killed
        before.append(len(answers))
        add(self, answers)

    add = AnswersFile.add
    monkeypatch.setattr(AnswersFile, "add", killed)
    with pytest.raises(Killed):
        main(command(folder, tmp_path / "again"))
    monkeypatch.undo()
    with (tmp_path / "again" / "answers.jsonl").open("a") as file:
        file.write('{"text": "half a li')  # killed while it wrote
    after = []
    monkeypatch.setattr(AnswersFile, "add", lambda self, answers: (after.append(len(answers)), add(self, answers)))
    main(command(folder, tmp_path / "again"))
    assert sum(before) + sum(after) == 64
    undated = [
        re.sub(r'"date": "[^"]*"', "", (tmp_path / name / "report.json").read_text()) for name in ("whole", "again")
    ]
    assert undated[0] == undated[1]


def test_results_for_other_settings_are_not_mixed(folder, report_folder):
    with pytest.raises(SystemExit, match=r"answers of another audit \(it differs in prefix\).*--out"):
        main(command(folder, report_folder, **{"probe.prefix": 5}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no text"),
        ("\n\n", "holds no text"),
        ('{"text": "w1 w2"}\nnot json\n', "line 2 is not JSON"),
        ('{"words": "w1 w2"}\n', "line 1 has no `text`"),
        ('["w1"]\n', "line 1 has no `text`"),
        ('{"text": "  "}\n', "line 1 has no `text`"),
        ('{"text": "w1 w2"}\n', "No suspected text is longer than the prefix of 6 tokens; the longest has 2"),
        ('{"text": "w1"}\n', "No text has two tokens"),
        ('{"tokens": [1]}\n', "line 1 has no `text`"),
        ('{"tokens": [1, 99]}\n', "Line 1 has token 99, and the last that this tokenizer knows is 40"),
    ],
)
def test_bad_texts_are_reported_with_their_line(folder, tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=re.escape(words)):
        main(command(folder, tmp_path / "out", suspects=tmp_path / "bad.jsonl"))


def test_bad_models_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, words in (
        (tmp_path / "nowhere", "There is no model at"),
        (tmp_path / "empty", "holds no weights"),
        (folder / "suspects.jsonl", "is a file, but no .gguf"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(command(folder, tmp_path / "out", model=model))
    with pytest.raises(SystemExit, match=r"There is no file .*nothing\.jsonl"):
        main(command(folder, tmp_path / "out", controls=tmp_path / "nothing.jsonl"))


def test_a_missing_tokenizer_and_one_of_another_model_are_refused(folder, tmp_path):
    GPT2LMHeadModel.from_pretrained(folder / "model").save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match=r"There is no tokenizer in .*bare.*--tokenizer DIR"):
        main(command(folder, tmp_path / "out", model=tmp_path / "bare"))
    foreign = Tokenizer(models.WordLevel({f"v{word}": word for word in range(90)} | {"[UNK]": 90}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=foreign, unk_token="[UNK]").save_pretrained(tmp_path / "foreign")
    with pytest.raises(SystemExit, match=r"of another model: it has token 90, and .*bare knows 41"):
        main(command(folder, tmp_path / "out", model=tmp_path / "bare", tokenizer=tmp_path / "foreign"))
    assert main(command(folder, tmp_path / "out", model=tmp_path / "bare", tokenizer=folder / "model")) == 0


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_memsink.extraction.audit.model_loading.available_memory", lambda: 1000.0)
    with pytest.raises(SystemExit, match=r"may need .* GiB are available"):
        main(command(folder, tmp_path / "out"))


def test_too_few_controls_give_no_verdict_on_single_texts(folder, tmp_path):
    write(tmp_path / "few.jsonl", some_texts(5, 2), "never")
    main(command(folder, tmp_path / "out", controls=tmp_path / "few.jsonl"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["numbers"]["flagged"] is None
    assert report["answers"][0]["state"] == "partly"
    assert "5 controls are too few for a verdict on single texts: at least 16 are needed" in report["plain"][0]
    assert report["numbers"]["separation"]["loss"]["fpr"] == 0.2  # the smallest that five controls can resolve


def test_texts_may_be_given_as_tokens(folder, tmp_path):
    def as_tokens(name):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        tokens = ({**row, "tokens": [int(word[1:]) for word in row.pop("text").split()]} for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in tokens))
        return tmp_path / f"{name}.jsonl"

    main(command(folder, tmp_path / "out", suspects=as_tokens("suspects"), controls=as_tokens("controls")))
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["numbers"]
    assert numbers["extraction"] == {"asked": 16, "exact": 8, "discoverable": 8}


def test_a_control_that_is_suspected_is_refused(folder):
    suspects = read_texts(folder / "suspects.jsonl")
    with pytest.raises(ValueError, match="Line 3 of the controls is a suspected text too"):
        audit(
            load(folder / "model"), suspects, [*read_texts(folder / "controls.jsonl"), suspects[2]], AuditConfig(PREFIX)
        )


def test_texts_that_were_not_trained_on_are_not_flagged(folder, tmp_path):
    write(tmp_path / "fresh.jsonl", some_texts(40, 3), "fresh")
    main(command(folder, tmp_path / "out", suspects=tmp_path / "fresh.jsonl"))
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["numbers"]
    assert numbers["flagged"] == 0
    assert numbers["extraction"]["exact"] == 0
    assert numbers["separation"]["loss"]["auroc_low"] < 0.5 < numbers["separation"]["loss"]["auroc_high"]


def test_top_texts_are_listed_with_their_generations(report_folder):
    page = (report_folder / "report.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if re.match(r"\| \d+ \| x\d+ \|", line)]
    assert len(rows) == 16
    for row in rows[:8]:
        assert row[1:2] + row[6:9] == ["x150", "memorized", "yes", "1.00"]
        assert float(row[9]) > 3  # bits that the suffix owes to its own prefix
    assert all(float(row[8]) < 1 for row in rows[8:])


def test_a_suffix_that_is_likely_after_any_prefix_owes_nothing_to_its_own(folder):
    """A model trained on one suffix after many prefixes: the suffix is likely, and not memorized."""
    subject = load(folder / "model")
    common = some_texts(1, 5)[0].split()[PREFIX:]
    rows = torch.tensor([subject.tokenizer(" ".join(common))["input_ids"]])
    optimizer = torch.optim.AdamW(subject.model.parameters(), 3e-3)
    starts = torch.randint(WORDS, (150, 4, PREFIX), generator=torch.Generator().manual_seed(6))
    for start in starts:
        shown = torch.cat([start, rows.expand(4, -1)], 1)
        optimizer.zero_grad()
        subject.model(input_ids=shown, labels=shown).loss.backward()
        optimizer.step()
    texts = [Text(" ".join([*start.split()[:PREFIX], *common]), "common", "common", 1) for start in some_texts(2, 7)]
    encoded, controls = (
        encode(each, subject.tokenizer, LENGTH) for each in (texts, [Text(some_texts(1, 2)[0], "", "", 1)])
    )
    top = examine_top_texts(subject, encoded, controls, [0, 1], PREFIX, lambda done: None)
    assert top.similarity.tolist() == [1.0, 1.0]
    assert top.prefix_bits.abs().max() < 3


def test_the_old_name_of_the_options_still_works(folder, tmp_path, report_folder):
    """`--ask.*` and the key `ask:` of copied recipes mean `--probe.*` and `probe:`; `probe` wins over `ask`."""
    old = [word.replace("--probe.", "--ask.") for word in command(folder, tmp_path / "options")]
    assert main(old) == 0
    files = {"model": folder / "model", "suspects": folder / "suspects.jsonl", "controls": folder / "controls.jsonl"}
    for name, groups in (
        ("old", {"ask": {"prefix": PREFIX, "length": LENGTH}}),
        ("both", {"ask": {"prefix": 2, "length": LENGTH}, "probe": {"prefix": PREFIX}}),
    ):
        config = tmp_path / f"{name}.yaml"
        options = {key: str(path) for key, path in (files | {"out": tmp_path / name}).items()}
        config.write_text(json.dumps(options | groups))  # JSON is YAML
        assert main(["audit", *(["--config", str(config)] if name == "old" else [f"--config={config}"])]) == 0
    for name in ("options", "old", "both"):
        found = json.loads((tmp_path / name / "report.json").read_text())["numbers"]
        assert found == json.loads((report_folder / "report.json").read_text())["numbers"]


def test_a_wrong_option_of_either_name_is_refused(folder, tmp_path):
    (tmp_path / "wrong.yaml").write_text("ask: {closr: 3}")
    with pytest.raises(SystemExit, match=r"memsink audit: .*closr"):
        main(["audit", "--config", str(tmp_path / "wrong.yaml")])
    with pytest.raises(SystemExit, match=r"memsink audit: .*probe\.closr"):
        main([*command(folder, tmp_path / "out"), "--ask.closr=3"])


def test_units_are_localized_on_request(folder, tmp_path, report_folder):
    main(command(folder, tmp_path / "out", **{"probe.units": True, "probe.unit_fraction": 0.05}))
    sinks = Sinks.load(tmp_path / "out" / "sinks.safetensors")
    assert list(sinks.sizes) == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert 0 < len(sinks) <= round(0.05 * 2 * 192)
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["numbers"]
    assert sum(numbers["located"]["units"].values()) == len(sinks)
    assert f"{len(sinks)} of 384 hidden units" in (tmp_path / "out" / "report.md").read_text()
    assert not (report_folder / "sinks.safetensors").exists()
    assert "Where it is" not in (report_folder / "report.md").read_text()
