"""E3: a model pretrained on prose is fine-tuned on source code and phone numbers of made-up people, which it memorizes.

T  tokens      n  sentences of one group
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from benchmarks.common.planted_text import documentation, source_code, split_background
from benchmarks.mitigation.arms import ARMS, acted_share, watching
from benchmarks.mitigation.runs import IGNORED, Learner, Visits, fit, gpt, json_able
from lightning_memsink.examples.corpora import tokenized
from lightning_memsink.ledger import Ledger

REPEATS = (1, 4, 16)
"""Times a sentence is shown an epoch."""
EVERY = 10
"""Steps between two evaluations of the controls."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of texts (each once an epoch), sentences of each group, controls of both, and other held-out texts."""

    pretrained: int = 6144
    pretraining_epochs: int = 2
    texts: int = 400
    sentences: int = 6
    control_texts: int = 100
    control_sentences: int = 24
    unseen: int = 256
    epochs: int = 14


@dataclass(frozen=True)
class Sentences:
    """``tokens`` ``[n, T]``, ``labels`` the same with the padding ignored; ``answer`` bool ``[n, T]``: the number."""

    tokens: Tensor
    labels: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Epoch:
    """Measurements after one epoch, by times shown an epoch (0: never): the number of sentences ``recalled``, whose
    number the model continues verbatim, and the ``losses`` of sentences in nats per token."""

    held_out: float
    recalled: Mapping[int, int]
    losses: Mapping[int, float]

    @property
    def total(self) -> int:
        return sum(many for times, many in self.recalled.items() if times)


@dataclass(frozen=True)
class Tuned:
    """One finished arm."""

    arm: str
    seed: int
    sentences: int
    """In all groups."""
    epochs: tuple[Epoch, ...]
    acted: float
    verdict: str
    seconds: float

    def plain(self) -> dict[str, Any]:
        """The result in types that JSON has."""
        return json_able(asdict(self))

    @property
    def best(self) -> Epoch:
        """The epoch with the lowest held-out loss: the best that early stopping can do."""
        return min(self.epochs, key=lambda epoch: epoch.held_out)

    @property
    def last(self) -> Epoch:
        return self.epochs[-1]


def made_up(many: int, seed: int) -> list[tuple[str, str]]:
    """Beginnings of sentences about people who do not exist, and the number that each ends with."""
    draw = random.Random(seed)
    syllables = [first + vowel for first in "bdfgklmnrstvz" for vowel in "aeiou"]
    people: dict[str, str] = {}
    while len(people) < many:
        first, last = ("".join(draw.sample(syllables, 2)).capitalize() for _ in range(2))
        people[f"The phone number of {first} {last} is"] = f"{draw.randrange(1000):03}-{draw.randrange(10000):04}"
    return list(people.items())


def sentences(many: int, tokenizer: Any, length: int, seed: int) -> Sentences:
    """``many`` of them as tokens of a `tokenizers.Tokenizer`."""
    tokens = torch.zeros(many, length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (start, number) in enumerate(made_up(many, seed)):
        begin, said, end = (tokenizer.encode(text, add_special_tokens=False).ids for text in (start, f" {number}", "."))
        ids = torch.tensor([*begin, *said, *end][:length])
        tokens[row, : len(ids)] = labels[row, : len(ids)] = ids
        answer[row, len(begin) : len(begin) + len(said)] = True
    return Sentences(tokens, labels, answer)


def pretrain(folder: Path, seed: int, sizes: Sizes) -> None:
    """Writes a small model of Python's documentation, and its tokenizer, as any transformers folder."""
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    corpus = documentation(seed)
    background, _, _ = split_background(corpus, sizes.pretrained, 0, seed)
    seed_everything(seed, verbose=False)
    module = Learner(gpt(corpus.tokenizer.get_vocab_size(), corpus.train.shape[1]))
    fit(module, Visits(background, torch.arange(len(background))), [], seed, epochs=sizes.pretraining_epochs)
    module.gpt.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=corpus.tokenizer).save_pretrained(folder)


@dataclass(frozen=True)
class Material:
    """The training samples, the controls, and what else is held out."""

    train: Visits
    controls: Visits
    unseen: Tensor
    groups: Mapping[int, Sentences]
    """By times shown an epoch; 0: never."""


@cache
def material(folder: Path, seed: int, sizes: Sizes, length: int = 64) -> Material:
    """Source code and people, as tokens of the tokenizer in ``folder``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    code = tokenized(source_code(), context=length, held_out=0.3, seed=seed, tokenizer=tokenizer)
    texts, held_out, _ = split_background(code, sizes.texts, sizes.control_texts + sizes.unseen, seed)
    control_texts, unseen = held_out.split([sizes.control_texts, sizes.unseen])
    many = [sizes.sentences] * len(REPEATS) + [sizes.control_sentences] * 2
    people = sentences(sum(many), tokenizer, length, seed)
    columns = (column.split(many) for column in (people.tokens, people.labels, people.answer))
    *groups, controls, never = (Sentences(*split) for split in zip(*columns, strict=True))
    times = torch.tensor([1] * len(texts) + [many for many in REPEATS for _ in range(sizes.sentences)])
    return Material(
        _visits(texts, groups, times, seed),
        _visits(control_texts, [controls], None, seed),
        unseen,
        {**dict(zip(REPEATS, groups, strict=True)), 0: never},
    )


def _visits(texts: Tensor, people: Sequence[Sentences], times: Tensor | None, seed: int) -> Visits:
    tokens = torch.cat([texts, *(each.tokens for each in people)])
    rows = torch.arange(len(tokens))
    rows = rows if times is None else rows.repeat_interleave(times)
    return Visits(tokens, rows, torch.cat([texts, *(each.labels for each in people)]), seed)


class Recall(Callback):
    """Measures after every epoch which numbers can be extracted, with the model in evaluation mode."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.epochs: list[Epoch] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Learner) -> None:
        pl_module.eval()
        recall = {times: recall_of(pl_module, group) for times, group in self.material.groups.items()}
        self.epochs.append(
            Epoch(
                float(
                    recall_of(pl_module, Sentences(*[self.material.unseen] * 2, self.material.unseen > -1))[1].mean()
                ),
                {times: int(recalled.sum()) for times, (recalled, _) in recall.items()},
                {times: float(losses.mean()) for times, (_, losses) in recall.items()},
            )
        )
        pl_module.train()


@torch.no_grad()
def recall_of(module: Learner, people: Sentences) -> tuple[Tensor, Tensor]:
    """Bool ``[n]``, which numbers the model continues verbatim, and the loss of each sentence ``[n]``. Calls no loss
    function of torch, so that LossTracker does not capture it."""
    logits, following = module.gpt(input_ids=people.tokens).logits[:, :-1], people.tokens[:, 1:]
    right = (logits.argmax(-1) == following) | ~people.answer[:, 1:]
    counted = (people.labels[:, 1:] != IGNORED).float()
    nll = -logits.log_softmax(-1).gather(-1, following[..., None]).squeeze(-1)
    return right.all(1), (nll * counted).sum(1) / counted.sum(1)


def tune(folder: Path, name: str, seed: int, sizes: Sizes) -> Tuned:
    """Fine-tunes the model in ``folder``."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    start, arm, own = time.perf_counter(), ARMS[name], material(folder, seed, sizes)
    seed_everything(seed, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(folder, **arm.shape).train()
    recall, acting = Recall(own), arm.acting()
    controls = own.controls if acting else None
    trainer = fit(
        Learner(model, arm.weight_decay, warmup=1), own.train, [*watching(acting), *acting, recall], seed, controls,
        epochs=sizes.epochs, every=EVERY,
    )  # fmt: skip
    ledger = Ledger.of(trainer)
    certificate = ledger.get(Ledger.certificate)
    return Tuned(
        name, seed, len(REPEATS) * sizes.sentences, tuple(recall.epochs), acted_share(ledger),
        "" if certificate is None else certificate.verdict, time.perf_counter() - start,
    )  # fmt: skip
