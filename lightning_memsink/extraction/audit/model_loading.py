"""The model to audit, from a local transformers folder or a GGUF file. Nothing is fetched."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
EDGE = 2**20
"""Bytes at both ends of a file of weights that its fingerprint stands on."""
EXPANDED = {".gguf": 8.0}
"""By suffix, what a byte of the file becomes at most in memory: quantized weights are unpacked to 32 bits."""


@dataclass(frozen=True)
class Subject:
    """A causal language model in evaluation mode, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    """Tells this model from others: a resumed audit must be of the same."""
    parameters: int


def load(path: Path, tokenizer: Path | None = None) -> Subject:
    """The model of a folder, or of a ``.gguf`` file.

    Args:
        path: where it is.
        tokenizer: a folder with another tokenizer than that of the model's.

    Raises:
        FileNotFoundError: there is no such folder or file, or nothing in it that looks like a model.
        MemoryError: it does not fit.
        ValueError: transformers can't load it, or its tokenizer is missing or of another model.
    """
    files = _weights(path)
    _fits(files)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path.parent if path.is_file() else path
    one_file = {"gguf_file": path.name} if path.is_file() else {}
    words = f"transformers can't load {path}"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, **one_file
        ).eval()
    except Exception as error:  # whatever it raises, the user reads one line
        raise ValueError(f"{words} as a causal language model: {_first_line(error)}") from error
    source, of_file = (folder, one_file) if tokenizer is None else (tokenizer, {})
    try:
        known = AutoTokenizer.from_pretrained(source, local_files_only=True, **of_file)
        if len(known.get_vocab()) <= len(known.all_special_tokens):  # transformers makes one up where there is none
            raise ValueError("it holds no vocabulary.")
    except Exception as error:
        raise ValueError(
            f"There is no tokenizer in {source}: {_first_line(error)} Say where it is: --tokenizer DIR"
        ) from error
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(known.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ValueError(
            f"The tokenizer in {source} is of another model: it has token {highest}, and {path} knows {rows}. "
            "Say where the right one is: --tokenizer DIR"
        )
    total = sum(weight.numel() for weight in model.parameters())
    return Subject(path.name, model, known, _fingerprint(files, folder, model), total)


def _weights(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {path}: expected a transformers folder or a .gguf file.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"{path} is a file, but no .gguf: pass the folder that it is in.")
        return [path]
    files = [found for pattern in WEIGHTS[:2] for found in sorted(path.glob(pattern))]
    if not files:
        inside = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{path} holds no weights ({' or '.join(WEIGHTS[:2])}), but {inside}.")
    return files


def _fits(files: list[Path]) -> None:
    """Before anything is loaded: half precision doubles, and a quarter is left for activations."""
    needed = 1.25 * sum(EXPANDED.get(file.suffix, 2.0) * file.stat().st_size for file in files)
    free = available_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"The model may need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are available. Audit it on a "
            "larger machine, or a quantized .gguf of it."
        )


def available_memory() -> float | None:
    """Bytes that can be had without swapping; None where the system does not tell (outside Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _fingerprint(files: list[Path], folder: Path, model: Any) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(EDGE))
            content.seek(max(0, size - EDGE))
            digest.update(content.read(EDGE))
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
