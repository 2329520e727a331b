"""Loads the model to audit from a local transformers folder or a GGUF file. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
EDGE = 2**20
"""Bytes at each end of a weight file that its fingerprint is computed from."""
EXPANDED = {".gguf": 8.0}
"""By suffix, the most bytes in memory per byte of the file: quantized weights are unpacked to 32 bits."""


@dataclass(frozen=True)
class Subject:
    """A causal language model in evaluation mode, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    """Identifies the model: an audit is resumed only with the same model."""
    parameters: int


def load(path: Path, tokenizer: Path | None = None) -> Subject:
    """The causal language model in a transformers folder or a ``.gguf`` file, with its tokenizer.

    Args:
        path: the folder or file.
        tokenizer: the folder of the tokenizer, if it is not that of the model.

    Raises:
        FileNotFoundError: there is no such folder or file, or the folder holds no weights.
        MemoryError: the model does not fit into memory.
        ValueError: transformers can't load the model, or its tokenizer is missing or of another model.
    """
    files = _weights(path)
    _require_memory(files)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path.parent if path.is_file() else path
    one_file = {"gguf_file": path.name} if path.is_file() else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, **one_file
        ).eval()
    except Exception as error:  # of any type: the user gets one line
        raise ValueError(f"transformers can't load {path} as a causal language model: {_first_line(error)}") from error
    source, of_file = (folder, one_file) if tokenizer is None else (tokenizer, {})
    try:
        loaded = AutoTokenizer.from_pretrained(source, local_files_only=True, **of_file)
        if len(loaded.get_vocab()) <= len(
            loaded.all_special_tokens
        ):  # transformers returns an empty one if there is none
            raise ValueError("it holds no vocabulary.")
    except Exception as error:
        raise ValueError(
            f"There is no tokenizer in {source}: {_first_line(error)} Say where it is: --tokenizer DIR"
        ) from error
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(loaded.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ValueError(
            f"The tokenizer in {source} is of another model: it has token {highest}, and {path} knows {rows}. "
            "Say where the right one is: --tokenizer DIR"
        )
    total = sum(weight.numel() for weight in model.parameters())
    return Subject(path.name, model, loaded, _fingerprint(files, model), total)


def _weights(path: Path) -> list[Path]:
    """The weight files of a model."""
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {path}: expected a transformers folder or a .gguf file.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"{path} is a file, but no .gguf: pass the folder that it is in.")
        return [path]
    files = [file for pattern in WEIGHTS[:2] for file in sorted(path.glob(pattern))]
    if not files:
        inside = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{path} holds no weights ({' or '.join(WEIGHTS[:2])}), but {inside}.")
    return files


def _require_memory(files: list[Path]) -> None:
    """Raises MemoryError before anything is loaded: half precision doubles, and a quarter is added for activations."""
    needed = 1.25 * sum(EXPANDED.get(file.suffix, 2.0) * file.stat().st_size for file in files)
    free = available_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"The model may need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are available. Audit it on a "
            "larger machine, or a quantized .gguf of it."
        )


def available_memory() -> float | None:
    """Bytes of memory available without swapping; None if unknown (outside Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _fingerprint(files: list[Path], model: Any) -> str:
    """SHA-256 of the configuration and of name, size and both ends of each weight file."""
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
