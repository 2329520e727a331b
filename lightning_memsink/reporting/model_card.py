"""The report's first page as a section of a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_memsink.reporting.document import Document, first_page

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TITLE = "## Memorization"
TAGS = ("memorization", "lightning-memsink")


def section(document: Document) -> str:
    """Markdown, headed by `TITLE`."""
    lines = [TITLE, "", *first_page(document)]
    limits = [words for each in document.sections if "does not show" in each.title for words in each.paragraphs]
    lines += ["What this does not show:", "", *(f"- {words}" for words in limits), ""]
    return "\n".join([*lines, f"Measured with lightning-memsink, {document.date}."]) + "\n"


def with_section(document: Document, card: Path) -> ModelCard:
    """The model card at ``card``, or a new one, with our section in the place of an older one and our tags.

    Raises:
        ValueError: its metadata is no YAML that the Hub understands.
    """
    from huggingface_hub import ModelCard, ModelCardData

    made: ModelCard
    if card.exists():
        made = ModelCard.load(card)
    else:
        made = ModelCard(f"---\n{ModelCardData(tags=list(TAGS)).to_yaml()}\n---\n\n# Model card\n")
    made.data["tags"] = list(dict.fromkeys([*(made.data.get("tags") or []), *TAGS]))
    made.text = f"{_without(made.text).rstrip()}\n\n{section(document)}"
    return made


def _without(text: str) -> str:
    """All but our section, which ends at the next heading of its level."""
    kept, ours = [], False
    for line in text.splitlines():
        if line.startswith(("# ", "## ")):
            ours = line.strip() == TITLE
        if not ours:
            kept.append(line)
    return "\n".join(kept)
