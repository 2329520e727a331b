"""What the recorded fits are trained on: text, digits, random labels, regression and multi-label classification."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.calibration.fits import Fit
from lightning_memsink.examples.corpora import Corpus, apart, python_code, python_docs, tokenized

VOCABULARY, CONTEXT = 512, 32
DOCUMENTATION, CODE, RANDOM, DUPLICATES = range(4)
"""Kinds of held-out texts; the last: texts of which each shares nine tenths of its tokens with others."""
VARIANTS, CHANGED = 6, 0.1
"""Near-duplicates of one text, and the share of tokens that differ in each."""


@cache
def documentation() -> Corpus:
    return tokenized(python_docs(), VOCABULARY, CONTEXT, held_out=0.6)


@cache
def source_code() -> Corpus:
    return tokenized(python_code(), context=CONTEXT, held_out=0.6, tokenizer=documentation().tokenizer)


def texts(seed: int) -> Fit:
    """Ten epochs of documentation, source code and random strings; all three, and near-duplicates, are held out."""
    docs, code = documentation(), source_code()
    generator = torch.Generator().manual_seed(seed)
    training = [_drawn(docs.train, 220, generator), _drawn(code.train, 60, generator), _random(40, generator)]
    ordinary, templates = _drawn(apart(docs.held_out), 1360, generator).split([1300, 60])
    held_out = [ordinary, _drawn(code.held_out, 200, generator), _random(200, generator)]
    held_out.append(_variants(templates, generator))
    return _language_model(training, held_out, seed, looks=10, steps_a_look=20)


def one_epoch(seed: int) -> Fit:
    """One epoch of documentation, looked at every eight steps."""
    docs = documentation()
    generator = torch.Generator().manual_seed(seed)
    held_out = _drawn(apart(docs.held_out), 500, generator)
    return _language_model([_drawn(docs.train, 5120, generator)], [held_out], seed, looks=40, steps_a_look=8)


def texts_with_dropout(seed: int) -> Fit:
    """Ten epochs of documentation with dropout .3: visits have higher losses than looks."""
    docs = documentation()
    generator = torch.Generator().manual_seed(seed)
    held_out = _drawn(apart(docs.held_out), 500, generator)
    training = [_drawn(docs.train, 320, generator)]
    return _language_model(training, [held_out], seed, looks=10, steps_a_look=20, dropout=0.3)


def digits(seed: int) -> Fit:
    """Thirteen epochs of digits, one of ten with a wrong label, of which half is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    wrong = torch.rand(len(labels), generator=generator) < 0.1
    labels = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)
    order = torch.randperm(len(labels), generator=generator)
    return _classifier((images[order], labels[order]), 800, _cross_entropy, 10, seed, dropout=0.5)


def random_labels(seed: int) -> Fit:
    """Labels drawn at random, learned by heart: the losses of held-out samples grow and spread."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3640, 32, generator=generator)
    labels = torch.randint(10, (len(inputs),), generator=generator)
    return _classifier((inputs, labels), 640, _cross_entropy, 10, seed)


def regression(seed: int) -> Fit:
    """Squared errors of a noisy function."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2140, 16, generator=generator)
    targets = inputs[:, 0].sin() + inputs[:, 1] * inputs[:, 2] + 0.5 * torch.randn(len(inputs), generator=generator)
    return _classifier((inputs, targets), 640, _squared_error, 1, seed, is_scale=True)


def multi_label(seed: int) -> Fit:
    """The mean of the binary cross-entropies of twenty labels, two of each sample's wrong by chance."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2140, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 20, generator=generator) > 2).float()
    labels = (labels - (torch.rand(labels.shape, generator=generator) < 0.1).float()).abs()
    return _classifier((inputs, labels), 640, _binary_cross_entropy, 20, seed)


FITS: dict[str, Callable[[int], Fit]] = {
    "texts": texts,
    "one epoch": one_epoch,
    "dropout": texts_with_dropout,
    "digits": digits,
    "random labels": random_labels,
    "regression": regression,
    "multi-label": multi_label,
}


def _language_model(
    training: list[Tensor],
    held_out: list[Tensor],
    seed: int,
    looks: int,
    steps_a_look: int,
    dropout: float = 0.0,
) -> Fit:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    kinds = torch.cat([torch.full((len(some),), kind) for kind, some in enumerate(held_out)])
    data = (torch.cat(training),), (torch.cat(held_out),)
    return Fit(model, _next_token, *data, kinds, looks, steps_a_look, 16, 4e-3, is_text=True)


def _classifier(
    data: tuple[Tensor, Tensor],
    trained: int,
    losses: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    outputs: int,
    seed: int,
    dropout: float = 0.0,
    is_scale: bool = False,
) -> Fit:
    """A multilayer perceptron on the first ``trained`` rows of ``data``; the others are held out."""
    torch.manual_seed(seed)
    inputs = data[0].shape[1]
    model = nn.Sequential(
        nn.Linear(inputs, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs)
    )
    training, held_out = (tuple(tensor[part] for tensor in data) for part in (slice(trained), slice(trained, None)))
    kinds = torch.zeros(len(held_out[0]), dtype=torch.int64)
    return Fit(model, losses, training, held_out, kinds, 10, 25, is_scale=is_scale)


def _next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    (tokens,) = batch
    logits: Tensor = model(input_ids=tokens).logits
    each = functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return each.mean(1)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _squared_error(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    predicted: Tensor = model(batch[0])
    return (predicted[:, 0] - batch[1]).square()


def _binary_cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none").mean(1)


def _drawn(sequences: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` rows of ``[., T]`` at random, or all if there are fewer."""
    return sequences[torch.randperm(len(sequences), generator=generator)[:count]]


def _random(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY, (count, CONTEXT), generator=generator)


def _variants(templates: Tensor, generator: torch.Generator) -> Tensor:
    """``[VARIANTS * G, T]``: of each of ``templates`` ``[G, T]`` several copies with other tokens at random places."""
    copies = templates.repeat(VARIANTS, 1)
    changed = torch.rand(copies.shape, generator=generator) < CHANGED
    return torch.where(changed, _random(len(copies), generator), copies)
