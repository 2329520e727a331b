"""The ledger as two Parquet files, readable without the run: ``samples.parquet`` and ``controls.parquet``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_memsink._files import written_whole
from lightning_memsink.detection.evaluate import evaluate
from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.reporting.name_text import names_of
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import COLUMNS, SCHEMA, LossTable
from lightning_memsink.samples.sample_names import SampleNames
from lightning_memsink.samples.sources import NO_SOURCE, OTHER, OTHER_CODE, SourceNames

_KEY = b"memsink"
_NAME = "sample_name"
_SOURCE = "source"
_OF_A_RESUME = {name for name in COLUMNS if name.startswith("window")}
"""Columns that only a resumed run reads."""


def write_ledger(folder: Path, table: LossTable, controls: ControlTable, flags: Flags, with_names: bool = True) -> None:
    """Writes both files, each complete or not there.

    A row of ``samples`` is a sample: its id, the columns of :class:`LossTable`, and the detector's verdict, gap
    (nats), p-value and onset. A row of ``controls`` is a held-out sample with its losses and features. Where samples
    have keys that are no 64-bit integers, a last column ``sample_name`` has these as text, null for a sample without.
    Columns that a run may not have are there if it has them: ``first_row`` and ``rows`` of the data set that a text
    came from, its ``source`` as a label, null without one, and its ``family``.

    Args:
        folder: is made if it isn't there.
        table: of the samples, with their names.
        controls: the held-out samples.
        flags: the verdicts.
        with_names: False leaves the names out, for files that leave the machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags.grow(len(table))
    state = table.state_dict()
    columns = {"sample_id": state["ids"], **state["columns"]}
    for name in _OF_A_RESUME & columns.keys():
        del columns[name]
    verdicts = {name: getattr(flags, name) for name in ("gap", "p", "streak", "onset_step", "onset_exposures")}
    samples = _with_sources(_arrow({**columns, **verdicts}), table.source_names)
    codes = pa.array(flags.verdict.numpy())
    for column in ("word", "reason"):
        meaning = pa.array([getattr(verdict, column) for verdict in Verdict], pa.string())
        samples = samples.append_column({"word": "verdict"}.get(column, column), meaning.take(codes))
    names = table.names if with_names else SampleNames()
    samples = _with_names(samples, names)
    control_state = controls.state_dict()
    held_out = _arrow(
        {
            "sample_id": control_state["ids"],
            **{name: control_state[name] for name in ("features", *_VECTORS)},
        }
    )
    metadata = {name: control_state[name] for name in ("curve", "previous_step", "latest_step")}
    of_samples: dict[str, object] = {name: getattr(table, name) for name in _OF_TABLE}
    of_samples["sources"] = table.source_names.labels
    _write(folder / "samples.parquet", samples, of_samples)
    _write(folder / "controls.parquet", _with_names(held_out, names), metadata)


def read_ledger(folder: Path) -> tuple[LossTable, ControlTable]:
    """The tables that :func:`write_ledger` wrote, in this version or an older one. Names of samples are the text that
    was written.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not a ledger, or has another schema.
    """
    path = folder / "samples.parquet"
    samples, sample_names, metadata = _read(path)
    ids, table = samples["sample_id"], LossTable()
    table.source_names.load_state_dict({"labels": metadata.pop("sources", [])})
    if _SOURCE in pq.read_schema(path).names:
        labels = pq.read_table(path, columns=[_SOURCE])[_SOURCE].to_pylist()
        samples[_SOURCE] = table.source_names.codes(labels)
    columns = {
        name: (samples[name] if like.ndim == 1 else _matrix(samples, name, len(ids))).to(like.dtype)
        for name, like in table.state_dict()["columns"].items()
    }
    columns |= {
        name: samples[name].to(column.dtype)
        for name, column in COLUMNS.items()
        if column.is_optional and name in samples
    }
    table.load_state_dict({"schema": SCHEMA, "ids": ids, "columns": columns, **metadata})
    table.names.add(sample_names)
    held_out, control_names, metadata = _read(folder / "controls.parquet")
    table.names.add(control_names)
    ids, controls = held_out["sample_id"], ControlTable()
    vectors = {name: held_out[name] for name in _VECTORS}
    features = _matrix(held_out, "features", len(ids))
    controls.load_state_dict({"ids": ids, "features": features, **vectors, **metadata})
    return table, controls


def detect(folder: Path, rule: DetectionRule | None = None) -> tuple[Flags, Evaluation]:
    """Runs the detector on a ledger on disk: every sample is judged by its last visit, at one evaluation.

    During training a flag must hold at two evaluations in a row. Here there is only one, so one is enough.
    """
    table, controls = read_ledger(folder)
    flags = Flags()
    return flags, evaluate(table, controls, flags, rule or DetectionRule(), consecutive=1, epoch=0)


_VECTORS = ("previous", "latest")
_OF_TABLE = ("reference_step", "unit", "begins_with_training")
"""Of the state of the loss table, what is no column; a file of an older version may lack some."""


def _arrow(columns: dict[str, Tensor]) -> pa.Table:
    """A table with a column per vector; a matrix ``[N, F]`` becomes ``name_0`` … ``name_F-1``."""
    arrays = {}
    for name, column in columns.items():
        values = (column.float() if column.is_floating_point() else column).numpy()
        parts = {name: values} if values.ndim == 1 else {f"{name}_{n}": part for n, part in enumerate(values.T)}
        arrays.update({part: pa.array(vector) for part, vector in parts.items()})
    return pa.table(arrays)


def _with_sources(table: pa.Table, names: SourceNames) -> pa.Table:
    """The table with labels in the place of codes of sources."""
    if _SOURCE not in table.column_names:
        return table
    codes = table[_SOURCE].to_numpy().astype("int64")
    labels = pa.array([*names.labels, OTHER], pa.string())
    places = pa.array(np.where(codes == OTHER_CODE, len(names), codes), mask=codes == NO_SOURCE)
    return table.set_column(table.column_names.index(_SOURCE), _SOURCE, labels.take(places))


def _with_names(table: pa.Table, names: SampleNames) -> pa.Table:
    """The table with a column of its samples' names, if any has one."""
    found = names_of(names, table["sample_id"].to_pylist()) if len(names) else []
    if all(name is None for name in found):
        return table
    return table.append_column(_NAME, pa.array(found, pa.string()))


def _matrix(columns: dict[str, Tensor], name: str, rows: int) -> Tensor:
    parts = [columns[part] for part in columns if part.rpartition("_")[0] == name]
    return torch.stack(parts, 1) if parts else torch.zeros(rows, 0)


def _write(path: Path, table: pa.Table, metadata: dict[str, object]) -> None:
    schema_metadata = {_KEY: json.dumps({"schema": SCHEMA, **metadata}).encode()}
    with written_whole(path) as unfinished:
        pq.write_table(table.replace_schema_metadata(schema_metadata), unfinished)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[int, str], dict[str, object]]:
    """The columns of numbers, the names by id, and the metadata."""
    if not path.exists():
        raise FileNotFoundError(f"Found no {path.name} in {path.parent}. write_ledger writes it beside the other file.")
    table = pq.read_table(path)
    metadata = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    if metadata.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is no memsink ledger of schema {SCHEMA}. Write it again with this version.")
    numbers = [name for name in table.column_names if not pa.types.is_string(table.schema.field(name).type)]
    columns = {name: torch.from_numpy(table[name].to_numpy().copy()) for name in numbers}
    if _NAME not in table.column_names:
        return columns, {}, metadata
    named = zip(table["sample_id"].to_pylist(), table[_NAME].to_pylist(), strict=True)
    return columns, {id: name for id, name in named if name is not None}, metadata
