"""The hidden layers of a model: places whose units can be distinguished, recorded and zeroed.

A hidden layer is the *input* of a module (an MLP's down projection, the next convolution): unit ``j`` is column ``j``
of that module's weight, so zeroing the column is zeroing the unit.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

MAX_NAMES = 6
SPATIAL_NORMS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NO_NONLINEARITY = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin, nn.Identity, nn.modules.batchnorm._BatchNorm)
NO_NONLINEARITY_FILES = "dropout flatten pooling padding upsampling pixelshuffle channelshuffle loss distance".split()


@dataclass(frozen=True)
class HiddenLayer:
    """The input of module ``name``. ``unit_axis`` is -1, or 1 where a convolution reads channels. ``batch_axis`` is 0,
    or 1 where the input is ``[T, B, U]``, as in torch's own transformer layers without ``batch_first``."""

    name: str
    module: nn.Module
    units: int
    unit_axis: int = -1
    batch_axis: int = 0


def unit_weights(layer: HiddenLayer) -> Tensor:
    """``[U, ...]`` view of the weight that reads the units; the frozen weight under a LoRA wrapper.

    Raises:
        ValueError: the weight is packed (quantized): it has no column per unit.
    """
    module = base_layer(layer.module)
    weight = module.get_parameter("weight")
    by_unit = weight if isinstance(module, _hf_conv1d()) else weight.transpose(0, 1) if weight.ndim > 1 else weight
    if len(by_unit) != layer.units:
        raise ValueError(
            f"{layer.name} ({type(module).__name__}) reads {layer.units} units with a weight {list(weight.shape)}. "
            "A packed weight has no column per unit: load the model unquantized."
        )
    return by_unit


def base_layer(module: nn.Module) -> nn.Module:
    """``module``, or what it wraps as LoRA layers do, at ``base_layer``."""
    inner = getattr(module, "base_layer", None)
    return base_layer(inner) if isinstance(inner, nn.Module) else module


def find_hidden_layers(model: nn.Module, modules: Sequence[str] | None = None) -> list[HiddenLayer]:
    """The hidden layers of ``model``, in its order.

    Without ``modules`` they are found by structure: an up and a down projection side by side in one module; Linear or
    Conv, activation, Linear or Conv in a row. Attention is similar, but more of its modules read the same input; a unit
    with two readers is a column of neither. An MLP of another structure is missed rather than guessed.

    Args:
        modules: ``fnmatch`` patterns for names of down projections. A pattern that matches hidden layers among others
            takes those; one that matches none of them takes every Linear and Conv it names.

    Raises:
        ValueError: none is found, a pattern matches nothing or an up projection, or a layer sits in compiled code.
    """
    if isinstance(modules, str):
        modules = [modules]
    readers = dict(_readers(model))
    pairs = writers_by_reader(model)
    if not modules and not pairs:
        raise ValueError(
            f"No hidden layer found in {type(model).__name__}. Looked for MLPs (an up and a down projection in one "
            "module, or Linear, activation, Linear in a row) and for convolutions that read a convolution's channels. "
            f"There {_some(list(readers))}. Name the modules whose inputs are the units: modules=[...]."
        )
    named = [_matching(model, pattern, readers, pairs) for pattern in modules or ()]
    chosen = {name for names in named for name in names} if named else set(pairs)
    _refuse_compiled(model, chosen)
    return [_hidden_layer(model, reader) for name, reader in readers.items() if name in chosen]


def describe(layers: Sequence[HiddenLayer]) -> str:
    """A table of name, module class and units; blocks in a row that are alike share a line."""
    seen: Counter[tuple[str, ...]] = Counter()
    runs: dict[tuple[tuple[str, ...], int], list[int]] = {}  # numbers in a row, as many alike before, are one run
    for layer in layers:
        head, number, tail = [*re.split(r"\b(\d+)\b", layer.name, maxsplit=1), "-1", ""][:3]
        alike = (head, tail, type(base_layer(layer.module)).__name__, f"{layer.units} units")
        runs.setdefault((alike, int(number) - seen[alike]), []).append(int(number))
        seen[alike] += 1
    rows: list[tuple[str, str, str]] = []
    for ((head, tail, kind, units), _), (first, *more) in runs.items():
        numbered = f"{first}-{more[-1]}" if more else str(first) if first >= 0 else ""
        rows.append((head + numbered + tail, kind, units + " each" * bool(more)))
    wide = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{name:<{wide[0]}}  {kind:<{wide[1]}}  {units}" for name, kind, units in rows)


@dataclass(frozen=True)
class _Reader:
    """A Linear or Conv and its numbers of input and output units."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    convolves: bool = False
    groups: int = 1

    def within(self, parent: str) -> str:
        """The name below ``parent``; without a dot if it is its child."""
        return self.name.removeprefix(f"{parent}.") if parent else self.name


def _hf_conv1d() -> type | tuple[()]:
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())


def _reader(name: str, module: nn.Module) -> _Reader | None:
    base = base_layer(module)
    if isinstance(base, nn.Linear):
        return _Reader(name, module, base.in_features, base.out_features)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _Reader(name, module, base.in_channels, base.out_channels, True, base.groups)
    if isinstance(base, _hf_conv1d()):
        return _Reader(name, module, *base.get_parameter("weight").shape)
    return None


def _readers(model: nn.Module) -> Iterator[tuple[str, _Reader]]:
    last = "\0"
    for name, module in model.named_modules():
        found = _reader(name, module)
        if found is not None and not name.startswith(f"{last}."):  # below are the parts of a LoRA layer
            last = name
            yield name, found


def _stream(name: str, module: nn.Module) -> list[_Reader | str]:
    """The parts of ``module`` in order: readers, "activation", "norm", "spatial norm", "source", "opaque"."""
    reader = _reader(name, module)
    if reader is not None:
        return [reader]
    file = type(module).__module__.rpartition(".")
    if isinstance(module, NO_NONLINEARITY) or (file[0] == "torch.nn.modules" and file[2] in NO_NONLINEARITY_FILES):
        return []
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return ["source"]
    if "norm" in type(module).__name__.lower():
        return ["spatial norm" if isinstance(module, SPATIAL_NORMS) else "norm"]
    if any(True for _ in module.parameters(recurse=False)):
        return ["activation" if isinstance(module, nn.PReLU) else "opaque"]
    if not any(True for _ in module.children()):
        return [] if any(True for _ in module.buffers(recurse=False)) else ["activation"]
    parts = _children_stream(name, module)
    if isinstance(module, nn.Sequential):
        return parts
    readers = sum(isinstance(part, _Reader) for part in parts)
    return ["opaque"] if readers > 1 or "opaque" in parts else parts


def _children_stream(name: str, module: nn.Module) -> list[_Reader | str]:
    children = [(f"{name}.{child}" if name else child, inner) for child, inner in module.named_children()]
    return [part for child, inner in children for part in _stream(child, inner)]


def writers_by_reader(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of modules that read hidden layers (down projections), each with those that write it (up, and gate)."""
    pairs: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleDict) or _reader(name, module) is not None:
            continue
        context = _ModuleContext(name, module, tuple(_children_stream(name, module)))
        for up, down, path in context.steps():
            if down.groups == 1 and context.is_hidden(up, down, path):
                siblings = () if isinstance(module, nn.Sequential) else context.readers()  # in a row, none is a gate
                alike = [reader.name for reader in siblings if context.have_same_shape(reader, up)]
                pairs.setdefault(down.name, tuple(dict.fromkeys((up.name, *alike))))
    return pairs


@dataclass(frozen=True)
class _ModuleContext:
    """A module with the streams of its children, one after the other."""

    name: str
    module: nn.Module
    parts: tuple[_Reader | str, ...]

    def readers(self) -> list[_Reader]:
        return [part for part in self.parts if isinstance(part, _Reader)]

    def steps(self) -> Iterator[tuple[_Reader, _Reader, list[str]]]:
        """Pairs of consecutive readers, each with the parts between them."""
        last, path = None, list[str]()
        for part in self.parts:
            if isinstance(part, str):
                path.append(part)
                continue
            if last is not None and not {"opaque", "source"} & set(path):
                yield last, part, path
            last, path = part, []

    def have_same_shape(self, one: _Reader, other: _Reader) -> bool:
        below = one.within(self.name) + other.within(self.name)
        return (one.inputs, one.outputs) == (other.inputs, other.outputs) and "." not in below

    def is_hidden(self, up: _Reader, down: _Reader, path: list[str]) -> bool:
        """True if ``down``, and no other module, reads the output of ``up`` through an activation."""
        after = path[len(path) - path[::-1].index("activation") :] if "activation" in path else path
        if "norm" in after or ("spatial norm" in after and not down.convolves) or (down.convolves and not up.convolves):
            return False  # a head that reads a normalized stream has the same structure
        if isinstance(self.module, nn.Sequential):
            return "activation" in path and up.outputs == down.inputs
        others = [reader for reader in self.readers() if reader not in (up, down)]
        is_shared = any(reader.inputs == down.inputs for reader in others)
        if "." in up.within(self.name) + down.within(self.name):
            owners = [reader.within(self.name).partition(".")[0] for reader in (up, down, *others)]
            lone = up.convolves or min(owners.count(owner) for owner in owners[:2]) == 1  # not two networks
            return lone and up.outputs == down.inputs and "activation" in path and not is_shared
        return self._is_mlp(up, down, others, is_shared, "activation" in path)

    def _is_mlp(self, up: _Reader, down: _Reader, others: list[_Reader], is_shared: bool, between: bool) -> bool:
        """The case of two children side by side. The forward may call an activation that is no module."""
        has_activation = "activation" in self.parts
        residual = up.inputs == down.outputs
        gated = has_activation and residual and up.outputs == 2 * down.inputs
        if up.outputs != down.inputs and not gated:
            return False
        alike = len({(reader.inputs, reader.outputs) for reader in self.readers()}) == 1
        square = up.inputs == up.outputs or down.inputs == down.outputs
        stem, number = re.split(r"(\d*)$", up.within(self.name), maxsplit=1)[:2]
        in_a_row = number and down.within(self.name) == f"{stem}{int(number) + 1}"
        if not (square and not alike and in_a_row):
            writers = 1 + sum(self.have_same_shape(reader, up) for reader in others)
            if is_shared or writers > 2 or (alike and isinstance(self.module, nn.ModuleList)):
                return False  # query, key and value read one input
        if not between and "opaque" in self.parts and not (residual or has_activation):
            return False  # a block between the two may be on the path
        return has_activation or re.search("attention|attn", type(self.module).__name__, re.IGNORECASE) is None


def _hidden_layer(model: nn.Module, reader: _Reader) -> HiddenLayer:
    ancestor = reader.name
    while ancestor and not reader.convolves:
        ancestor = ancestor.rpartition(".")[0]
        for child in model.get_submodule(ancestor).children():
            if isinstance(child, nn.MultiheadAttention):  # the nearest one has the layout of the sequences
                return HiddenLayer(reader.name, reader.module, reader.inputs, batch_axis=0 if child.batch_first else 1)
    return HiddenLayer(reader.name, reader.module, reader.inputs, 1 if reader.convolves else -1)


def _matching(
    model: nn.Module, pattern: str, readers: Mapping[str, _Reader], pairs: Mapping[str, tuple[str, ...]]
) -> list[str]:
    matched = [name for name in readers if fnmatchcase(name, pattern)]
    known = [name for name in matched if name in pairs]
    written = {up: down for down, ups in pairs.items() for up in ups}
    downs = [written[name] for name in matched if name in written]
    usable = [name for name in matched if readers[name].groups == 1]
    if known or (usable and not downs):
        return known or usable
    if matched and not usable:
        remedy = f"in {matched[0]} (groups > 1) a unit is no column of the weight. Name a convolution with groups=1"
    elif matched:
        remedy = f"{matched[0]} writes one, but units are named where they are read. There {_some(downs)}"
    else:
        names = list(pairs) or list(readers)
        inside = [name for name in names if fnmatchcase(name, f"{pattern}.*")]
        near = get_close_matches(pattern, names, MAX_NAMES, cutoff=0.4)
        remedy = f"no Linear or Conv has that name. There {_some(inside or near or names)}"
    raise ValueError(f"modules={pattern!r} names no hidden layer of {type(model).__name__}: {remedy}.")


def _refuse_compiled(model: nn.Module, chosen: Collection[str]) -> None:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported: nothing was compiled
    wrapper = getattr(dynamo, "OptimizedModule", ())
    for name, module in model.named_modules():
        inside = sorted(layer for layer in chosen if f"{layer}.".startswith(f"{name}." if name else ""))
        if inside and (isinstance(module, wrapper) or module._compiled_call_impl is not None):
            raise ValueError(
                f"{name or 'The model'} ({type(module).__name__}) is compiled and holds the hidden layer {inside[0]}: "
                "hooks in compiled code are ignored. Leave it uncompiled in this run, or name others: modules=[...]."
            )


def _some(names: Sequence[str]) -> str:
    """``is a.b``, ``are a, b and 5 more``, ``is none``."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{'are' if len(names) > 1 else 'is'} {', '.join(names[:MAX_NAMES]) or 'none'}{more}"
