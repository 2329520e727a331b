"""The samples of a finished run, most memorized first, read from its Parquet ledger without loading torch.

N  samples of the run      F  families of two samples or more
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILE = "samples.parquet"
_REQUIRED = ("sample_id", "exposures", "last_loss", "elements", "gap", "p", "verdict", "reason", "onset_step")
_OPTIONAL = ("sample_name", "first_row", "rows", "source", "family")
"""Columns that ledgers of earlier versions, or of runs that had no use for them, don't have."""
SHOWN_SOURCES = 10


@dataclass(frozen=True)
class ListedSample:
    """A sample as `memsink samples` lists it. Loss and gap in nats (per token for token losses)."""

    id: int
    name: str | None
    """The user's own key as text; None where the id is a number or a hash of the content."""
    first_row: int | None
    """The row of the data set that it first came from; None if that is not known."""
    more_rows: int
    """Other rows that it came from."""
    source: str | None
    exposures: int
    loss: float | None
    gap: float | None
    p: float | None
    tokens: int
    """Tokens (or other loss elements) counted at the last visit."""
    verdict: str
    reason: str
    """Why a sample is undecided; empty for other verdicts."""
    onset_step: int | None


@dataclass(frozen=True)
class ListedFamily:
    """Near-duplicates together: what a family adds up to, and the member with the largest gap."""

    texts: int
    memorized: int
    """Texts that are memorized by themselves."""
    exposures: int
    """Of all texts."""
    gap: float | None
    """Mean over the tokens of measured texts."""
    onset_step: int | None
    """The earliest of the texts' own."""
    member: ListedSample


class RunSamples:
    """The columns of one ``samples.parquet``.

    Args:
        path: of the file.

    Raises:
        ValueError: it is no ledger of samples.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            names = pq.read_schema(path).names
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not Parquet ({str(error).splitlines()[0]})") from None
        missing = [name for name in _REQUIRED if name not in names]
        if missing:
            raise ValueError(
                f"{path} is no ledger of samples: it has no column {missing[0]}. RunReport writes one to "
                f"NAME_files/ledger/{FILE}"
            )
        self.table = pq.read_table(path, columns=[*_REQUIRED, *(name for name in _OPTIONAL if name in names)])
        self.gaps = self.table["gap"].to_numpy().astype(np.float64)
        verdicts = self.table["verdict"].combine_chunks().dictionary_encode()
        words = verdicts.dictionary.to_pylist()
        self.memorized = (
            verdicts.indices.to_numpy() == words.index("memorized")
            if "memorized" in words
            else np.zeros(len(self), dtype=bool)
        )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def has(self, column: str) -> bool:
        """Whether the run recorded this optional column."""
        return column in self.table.column_names

    @property
    def has_row_numbers_as_ids(self) -> bool:
        """Whether the ids may be row numbers: small, without a sign and a name, as hashes of content aren't."""
        ids = self.table["sample_id"].to_numpy()
        return len(self) > 0 and not self.has("sample_name") and bool((ids >= 0).all() and (ids < 2**40).all())

    def of_source(self, label: str) -> Any:
        """Bool ``[N]``: the samples of a source. ValueError for a label that no sample has."""
        if not self.has("source"):
            raise ValueError(
                f"{self.path} has no sources. A run records them from batch['source'], or with "
                "memsink(source=key or function)"
            )
        column = self.table["source"].cast(pa.string()).combine_chunks().dictionary_encode()
        labels = [each for each in column.dictionary.to_pylist() if each is not None]
        if label not in labels:
            close = get_close_matches(label, labels, 1)
            first = ", ".join(f"`{each}`" for each in sorted(labels)[:SHOWN_SOURCES])
            more = f" and {len(labels) - SHOWN_SOURCES:,} more" if len(labels) > SHOWN_SOURCES else ""
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"No sample is of source `{label}`{hint} The run has {first or 'none'}{more}")
        code = column.dictionary.to_pylist().index(label)
        return column.indices.fill_null(-1).to_numpy(zero_copy_only=False) == code

    def most_memorized(self, top: int, among: Any = None) -> list[ListedSample]:
        """The ``top`` samples with the largest gaps, memorized ones first.

        Args:
            top: how many.
            among: bool ``[N]``, the samples to choose from; None for all.
        """
        places = np.arange(len(self)) if among is None else np.flatnonzero(among)
        gaps = np.nan_to_num(self.gaps[places], nan=-math.inf)
        order = np.lexsort((-gaps, ~self.memorized[places]))
        return self._listed(places[order[:top]])

    def largest_families(self, top: int, among: Any = None) -> tuple[list[ListedFamily], int]:
        """The ``top`` families with the largest gaps, and F.

        Args:
            top: how many.
            among: bool ``[N]``; a family with any such sample counts, with all of its samples. None for all.

        Raises:
            ValueError: the run looked for no near-duplicates.
        """
        if not self.has("family"):
            raise ValueError(f"{self.path} has no families: that run did not look for near-duplicates")
        family = self.table["family"].to_numpy().astype(np.int64)
        known = np.flatnonzero(family >= 0)
        if not len(known):
            return [], 0
        _, number = np.unique(family[known], return_inverse=True)
        texts = np.bincount(number)
        chosen = texts > 1
        if among is not None:
            chosen &= np.bincount(number, weights=among[known]) > 0
        tokens = np.where(np.isfinite(self.gaps[known]), self.table["elements"].to_numpy()[known], 0.0)
        weights = np.bincount(number, weights=tokens)
        sums = np.bincount(number, weights=tokens * np.nan_to_num(self.gaps[known]))
        means = np.divide(sums, weights, out=np.full(len(sums), -math.inf), where=weights > 0)
        exposures = np.bincount(number, weights=self.table["exposures"].to_numpy()[known].astype(np.float64))
        memorized = np.bincount(number, weights=self.memorized[known])
        families = np.flatnonzero(chosen)
        families = families[np.argsort(-means[families], kind="stable")][:top]
        by_gap = np.lexsort((-np.nan_to_num(self.gaps[known], nan=-math.inf), number))
        starts = np.searchsorted(number[by_gap], np.arange(len(texts)))
        onsets = self.table["onset_step"].to_numpy()[known]
        members = self._listed(known[by_gap[starts[families]]])
        listed = []
        for each, member in zip(families.tolist(), members, strict=True):
            own = onsets[by_gap[starts[each] : starts[each] + texts[each]]]
            listed.append(
                ListedFamily(
                    int(texts[each]),
                    int(memorized[each]),
                    int(exposures[each]),
                    _finite(float(means[each])),
                    int(own[own >= 0].min()) if (own >= 0).any() else None,
                    member,
                )
            )
        return listed, int(chosen.sum())

    def _listed(self, places: Any) -> list[ListedSample]:
        rows = self.table.take(pa.array(places, pa.int64())).to_pylist()
        return [_sample(row) for row in rows]


def samples_file(run: Path) -> Path:
    """The ledger of a run: of the folder of its report, of the report itself, or of a folder below the report.

    Raises:
        FileNotFoundError: there is none, or several.
    """
    if run.suffix == ".parquet" and run.is_file():
        return run
    folder = run.with_name(f"{run.stem}_files") if run.is_file() else run
    candidates = [folder / FILE, folder / "ledger" / FILE]
    found = [path for path in candidates if path.is_file()] or sorted(folder.glob(f"*_files/ledger/{FILE}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(path) for path in found)
        raise FileNotFoundError(f"{run} has the ledgers of {len(found)} runs; name one of them: {names}")
    if not run.exists():
        raise FileNotFoundError(f"There is no {run}. Name the folder that memsink_report.md is in, or a {FILE}")
    raise FileNotFoundError(
        f"{run} has no ledger. Name the folder that memsink_report.md is in (RunReport writes "
        f"memsink_report_files/ledger/{FILE} at the end of training), or that file"
    )


def as_json(listed: Iterable[ListedSample | ListedFamily], texts: Sequence[str | None] | None = None) -> str:
    """A JSON array of what is listed, with its text where there is one. Unknown numbers are null."""
    rows = []
    for place, each in enumerate(listed):
        row = vars(each).copy()
        if isinstance(each, ListedFamily):
            row["member"] = vars(each.member).copy()
        if texts is not None:
            row["text"] = texts[place]
        rows.append(row)
    return json.dumps(rows, indent=1, allow_nan=False)


def _sample(row: dict[str, Any]) -> ListedSample:
    first_row, source = row.get("first_row"), row.get("source")
    return ListedSample(
        row["sample_id"],
        row.get("sample_name"),
        first_row if first_row is not None and first_row >= 0 else None,
        max(0, (row.get("rows") or 0) - 1),
        None if source is None else str(source),
        row["exposures"],
        _finite(row["last_loss"]),
        _finite(row["gap"]),
        _finite(row["p"]),
        int(_finite(row["elements"]) or 0),
        row["verdict"],
        row["reason"],
        row["onset_step"] if row["onset_step"] >= 0 else None,
    )


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
