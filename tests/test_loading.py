"""Nothing that is read runs code: each loader of this package is fed a pickle that would, and refuses it in words."""

import ast
import os
import pickle
from pathlib import Path

import pytest
import torch

import lightning_memsink
from lightning_memsink import LossTracker, MemorizationDetector
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.cli import report as reports
from lightning_memsink.extraction.audit.answer_cache import AnswersFile
from lightning_memsink.extraction.audit.model_loading import load
from lightning_memsink.extraction.audit.texts import read_texts
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.reporting.parquet import detect, read_ledger
from tests.support.small_runs import TinyLM, fit

PACKAGE = Path(lightning_memsink.__file__).parent


class Malicious:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def as_ledger(path):
    for name in ("samples", "controls"):
        (path.parent / f"{name}.parquet").write_bytes(path.read_bytes())
    return path.parent


def as_model(path):
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"):
        (path.parent / name).write_bytes(path.read_bytes())
    return path.parent


def as_torch_model(path):
    """A file that transformers unpickles unless it is prevented."""
    (path.parent / "config.json").write_text('{"model_type": "gpt2"}')
    (path.parent / "pytorch_model.bin").write_bytes(path.read_bytes())
    return path.parent


LOADERS = {
    "sinks": Sinks.load,
    "sinks of a callback": lambda path: fit([LossTracker(), MemorizationDetector(), SinkDropout(sinks=path)]),
    "ledger": lambda path: read_ledger(as_ledger(path)),
    "detector over a ledger": lambda path: detect(as_ledger(path)),
    "answers": lambda path: AnswersFile(path, {}),
    "texts": read_texts,
    "report": reports.read_document,
    "model": lambda path: load(as_model(path), None),
    "model of torch": lambda path: load(as_torch_model(path), None),
    "quantized model": lambda path: load(path.rename(path.with_suffix(".gguf")), None),
}


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_refuses_a_pickle_and_does_not_run_it(name, kind, tmp_path):
    mark, path = tmp_path / "was here", tmp_path / "file"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(mark)))
    else:
        torch.save(Malicious(mark), path)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        LOADERS[name](path)
    assert not mark.exists()
    assert str(tmp_path) in str(refused.value), "the file is named"


def test_a_checkpoint_with_a_pickle_in_our_state_is_not_run(tmp_path):
    """Lightning loads with weights_only, which all that we save passes."""
    path, mark = tmp_path / "evil.ckpt", tmp_path / "was here"
    fit([LossTracker(), MemorizationDetector()], max_epochs=1)[0].save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    state["callbacks"]["LossTracker"]["table"]["schema"] = Malicious(mark)
    torch.save(state, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        fit([LossTracker(), MemorizationDetector()], TinyLM(), ckpt_path=str(path))
    assert not mark.exists()


def test_the_source_names_nothing_that_runs_what_it_reads():
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for source in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not unsafe & {name.partition(".")[0] for name in names}, source
            if not isinstance(node, ast.Call):
                continue
            called, options = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), source
            assert called != "torch.load" or options.get("weights_only") == "True", source
            assert options.get("allow_pickle", "False") == "False", source
            assert options.get("trust_remote_code", "False") == "False", source
