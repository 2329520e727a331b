"""Sinks: the units that carry memorized samples, as `lightning_memsink.localization.locate` finds them.

U  units of a hidden layer      k  units of it that were chosen
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_memsink._files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
_KEY = "lightning_memsink.sinks"
_UNITS_SHOWN, _WIDTH = 6, 110


@dataclass(frozen=True)
class Sinks:
    """Units that carry memorized samples, by the name of the module that reads them."""

    units: Mapping[str, Tensor] = field(default_factory=dict)
    """``[k]`` int64 each: unit numbers, the highest score first."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """``[k]`` each, in the order of ``units``; comparable between layers, the higher the more of a sink."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """``U`` of every layer that was searched, including those without sinks."""
    method: str = ""
    """The name of the method that scored the units."""
    stability: tuple[float, float] | None = None
    """Overlap (Jaccard, 0…1) of the sinks located from two halves of the samples, and the expected overlap of random
    sets of that size; None if there were too few samples to halve."""

    def __post_init__(self) -> None:
        if self.units.keys() != self.scores.keys() or not self.units.keys() <= self.sizes.keys():
            raise ValueError(
                f"Sinks name the same layers in units, scores and sizes, but they are {sorted(self.units)}, "
                f"{sorted(self.scores)} and {sorted(self.sizes)}."
            )
        for name, chosen in self.units.items():
            if chosen.shape != self.scores[name].shape or chosen.ndim != 1 or chosen.dtype != torch.int64:
                raise ValueError(
                    f"{name}: units are int64 [k] and scores are [k], but {chosen} and {self.scores[name]}."
                )
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.sizes[name]:
                raise ValueError(f"{name} has units 0…{self.sizes[name] - 1}, but the sinks name {chosen.tolist()}.")

    def __len__(self) -> int:
        return sum(map(len, self.units.values()))

    @property
    def empty(self) -> bool:
        return len(self) == 0

    @property
    def fraction(self) -> float:
        """Of all units searched, 0…1."""
        return len(self) / max(1, sum(self.sizes.values()))

    def masks(self) -> dict[str, Tensor]:
        """Bool ``[U]`` of every layer searched: true where the unit is a sink."""
        return {
            name: torch.zeros(size, dtype=torch.bool).index_fill_(0, self.units[name].cpu(), True)
            if name in self.units
            else torch.zeros(size, dtype=torch.bool)
            for name, size in self.sizes.items()
        }

    def top(self, count: int) -> Sinks:
        """The ``count`` units of the highest scores over all layers; without stability, which was of the whole set."""
        if count >= len(self):
            return self
        every = torch.cat([self.scores[name].double().cpu() for name in self.units])
        best = torch.zeros(len(every), dtype=torch.bool)
        best[every.argsort(descending=True, stable=True)[:count]] = True
        kept = dict(zip(self.units, best.split([len(chosen) for chosen in self.units.values()]), strict=True))
        return Sinks(
            {name: chosen[kept[name]] for name, chosen in self.units.items()},
            {name: scores[kept[name]] for name, scores in self.scores.items()},
            self.sizes,
            self.method,
        )

    def table(self) -> Table:
        """A table with one row a layer, in the order of the model."""
        title = self._title()
        table = Table(title=title, title_justify="left", min_width=min(len(title), _WIDTH))
        for column in ("layer", "sinks", "of", "units, best first"):
            table.add_column(column, justify="right" if column in ("sinks", "of") else "left")
        for name, size in self.sizes.items():
            chosen = self.units[name].tolist() if name in self.units else []
            shown = ", ".join(map(str, chosen[:_UNITS_SHOWN])) + (", …" if len(chosen) > _UNITS_SHOWN else "")
            table.add_row(name, f"{len(chosen):,}", f"{size:,}", shown)
        return table

    def plot(self) -> Figure:
        """Bars of the share of sinks among each layer's units, and a line at an even spread. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 1.4 + 0.35 * len(self.sizes)), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        shares = [len(self.units.get(name, ())) / size for name, size in self.sizes.items()]
        axes.barh(list(self.sizes), shares, color="#D55E00")
        axes.axvline(self.fraction, color="#333333", linestyle="--", linewidth=1, label="spread evenly")
        axes.invert_yaxis()  # from the input down
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        axes.set_xlabel("sinks, of the layer's units")
        axes.set_title(f"{len(self):,} sinks by {self.method or 'no named method'}", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        return figure

    def __str__(self) -> str:
        console = Console(width=_WIDTH, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()

    def _title(self) -> str:
        title = f"{len(self):,} sinks ({100 * self.fraction:.2g} % of units) by {self.method or 'no named method'}"
        if self.stability is None:
            return f"{title}; stability unknown: too few samples to halve"
        observed, chance = self.stability
        return f"{title}; halves of the samples agree on {100 * observed:.0f} % (chance {100 * chance:.1f} %)"

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, readable without this package; a failure leaves no part of it."""
        path = Path(path)
        metadata = {"schema": SCHEMA, "sizes": dict(self.sizes), "method": self.method, "stability": self.stability}
        tensors = {f"units/{name}": chosen.cpu().contiguous() for name, chosen in self.units.items()}
        tensors |= {f"scores/{name}": scores.detach().cpu().contiguous() for name, scores in self.scores.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            unfinished.write_bytes(save(tensors, {_KEY: json.dumps(metadata)}))

    @classmethod
    def load(cls, path: str | Path) -> Sinks:
        """Sinks from a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or sinks of another schema.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"Found no sinks at {path}. Sinks.save(path) writes them.")
        metadata, tensors = _read(Path(path))
        return cls(
            {key.removeprefix("units/"): values for key, values in tensors.items() if key.startswith("units/")},
            {key.removeprefix("scores/"): values for key, values in tensors.items() if key.startswith("scores/")},
            metadata["sizes"],
            metadata["method"],
            None if metadata["stability"] is None else tuple(metadata["stability"]),
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no safetensors file ({error}). Sinks.save(path) writes what can be loaded."
        ) from error
    if metadata is None:
        raise ValueError(f"{path} is a safetensors file, but holds no sinks: {', '.join(list(tensors)[:4])}.")
    if metadata.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} holds sinks of schema {metadata.get('schema')}, and this version reads schema {SCHEMA}. "
            "Locate them again, or load them with the version that saved them."
        )
    order = {name: place for place, name in enumerate(metadata["sizes"])}
    return metadata, dict(sorted(tensors.items(), key=lambda item: order.get(item[0].partition("/")[2], 0)))
