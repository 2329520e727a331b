"""A model fine-tuned on records of made-up people: the audit shows how often each was trained on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.mitigation.fine_tuning import Sizes, pretrain, sentences
from lightning_memsink.cli import main

TIMES, EACH, NEVER = (1, 4, 16), 8, 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_dose_shows_in_the_audit(tmp_path):
    folder = tmp_path / "model"
    pretrain(folder, 0, Sizes(pretrained=1024, pretraining_epochs=1))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    people = sentences(EACH * len(TIMES) + NEVER, tokenizer.backend_tokenizer, 64, seed=1)
    rows = torch.arange(EACH * len(TIMES)).repeat_interleave(torch.tensor(TIMES).repeat_interleave(EACH))
    optimizer, draw = torch.optim.AdamW(model.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(6):
        for batch in rows[torch.randperm(len(rows), generator=draw)].split(16):
            optimizer.zero_grad()
            model(input_ids=people.tokens[batch], labels=people.labels[batch]).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    lines = [json.dumps({"tokens": row[row != 0].tolist(), "kind": "people"}) for row in people.tokens]
    groups = [f"x{times}" for times in TIMES for _ in range(EACH)]
    rows_by_group = [json.loads(line) | {"group": group} for line, group in zip(lines, groups, strict=False)]
    (tmp_path / "suspects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_by_group))
    (tmp_path / "controls.jsonl").write_text("\n".join(lines[len(groups) :]))
    files = {name: f"--{name}={tmp_path / name}.jsonl" for name in ("suspects", "controls")}
    main(["audit", f"--model={folder}", *files.values(), f"--out={tmp_path / 'out'}", "--probe.prefix=12"])
    found = json.loads((tmp_path / "out" / "report.json").read_text())["numbers"]
    bits = found["bits_a_token"]
    assert bits["x16"]["mean"] > bits["x4"]["mean"] > bits["x1"]["mean"]
    assert bits["x16"]["low"] > bits["x1"]["high"]
    assert found["flagged"] >= EACH
