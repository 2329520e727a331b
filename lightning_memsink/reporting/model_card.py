"""A section of a model card, made from the first page of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_memsink.reporting.document import Document, first_page

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TITLE = "## Memorization"
TAGS = ("memorization", "lightning-memsink")


def section(document: Document) -> str:
    """The section as Markdown, under `TITLE`."""
    lines = [TITLE, "", *first_page(document)]
    limits = [words for each in document.sections if "does not show" in each.title for words in each.paragraphs]
    lines += ["What this does not show:", "", *(f"- {words}" for words in limits), ""]
    return "\n".join([*lines, f"Measured with lightning-memsink, {document.date}."]) + "\n"


def with_section(document: Document, card: Path) -> ModelCard:
    """The model card at ``card``, or a new one, with the section and the tags. An earlier section is replaced.

    Raises:
        ValueError: the metadata of the card is not valid YAML for the Hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    result: ModelCard
    if card.exists():
        result = ModelCard.load(card)
    else:
        result = ModelCard(f"---\n{ModelCardData(tags=list(TAGS)).to_yaml()}\n---\n\n# Model card\n")
    result.data["tags"] = list(dict.fromkeys([*(result.data.get("tags") or []), *TAGS]))
    result.text = f"{_without(result.text).rstrip()}\n\n{section(document)}"
    return result


def _without(text: str) -> str:
    """The text without the section, which ends at the next heading of its level."""
    kept, in_section = [], False
    for line in text.splitlines():
        if line.startswith(("# ", "## ")):
            in_section = line.strip() == TITLE
        if not in_section:
            kept.append(line)
    return "\n".join(kept)
