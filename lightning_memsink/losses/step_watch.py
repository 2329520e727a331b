"""Watches the torch calls of a step: whose rows each tensor has, and what each reduction was taken of.

Every loss, known or written by hand, ends in reductions: a mean or sum of some tensor, or a loss function with a
reduction of its own. Their operands are seen here as they are called, and the way from the batch to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_memsink.losses.compiled_parts import never_compile_alone
from lightning_memsink.losses.document_attention import attends_across, row_owners
from lightning_memsink.losses.loss_factors import PRODUCTS, LossFactors
from lightning_memsink.losses.provenance import Lost, Provenance, Rows
from lightning_memsink.losses.readers import RECORDERS
from lightning_memsink.losses.reduced import REDUCTIONS, Reduced, versions
from lightning_memsink.losses.row_rules import changes_in_place, follow
from lightning_memsink.losses.rule_call import ProvenanceOf, tensors_in
from lightning_memsink.losses.shadow_graph import ShadowGraph
from lightning_memsink.losses.unreduced import Record, has_reduction

# What these make keeps the name of the loss that it was made of.
KEEPS_NAME = PRODUCTS | frozenset(
    "view reshape flatten unflatten squeeze unsqueeze float double to __getitem__ gather index_select masked_select "
    "masked_fill where neg __neg__ transpose permute contiguous clone detach expand sum mean div __truediv__ "
    "truediv cat stack chunk split unbind T __get__ nan_to_num type select narrow mul_ div_".split()
)
# These pick or order rows by values, which another step may do otherwise.
DYNAMIC = frozenset(
    "__getitem__ index_select gather take take_along_dim masked_select sort topk argsort repeat_interleave index_add "
    "index_add_ scatter_add scatter_add_ index_copy index_copy_ scatter scatter_ __setitem__ index_put "
    "index_put_".split()
)


PACKED = "it has no targets of the batch, whose rows hold several documents"


@dataclass
class _Known:
    """A tensor seen in the step."""

    tensor: weakref.ref[Tensor]
    provenance: Provenance | None
    name: str = ""
    is_dynamic: bool = False


@dataclass
class Watched:
    """What was seen of a step."""

    reductions: dict[Node, Reduced] = field(default_factory=dict)
    without_graph: list[tuple[Tensor, Reduced]] = field(default_factory=list)
    """Reductions that had no node yet: in a checkpointed region, which gives them one later."""
    compiled: list[tuple[Record, Tensor]] = field(default_factory=list)
    """Loss calls inside compiled code, with their targets."""
    attends_across: bool = False
    """Whether tokens of several documents in a row depend on one another."""


class StepWatch(TorchFunctionMode):
    """A torch function mode that follows the batch through a step. It changes no call.

    Inside compiled code it records loss calls only. It costs some microseconds for each torch call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered = self.paused = self.is_packed = False
        self.seen = Watched()
        self.shadows: ShadowGraph | None = None
        self._row_owners: Tensor | None = None
        self.error: Exception | None = None
        """The first exception while watching, which the user's own call must not see."""
        self._known: dict[int, _Known] = {}
        self._factors = LossFactors()

    def start(
        self,
        rows: Iterable[tuple[Tensor, Tensor]] = (),
        shadows: ShadowGraph | None = None,
        is_packed: bool = False,
    ) -> None:
        """Enters the mode.

        Args:
            rows: the batch's tensors with their owners, as `SampleRows` has them.
            shadows: to be filled, in a step that autograd does not record.
            is_packed: whether a row of the batch holds several samples. What the model makes of a row is then of none
                of them alone: a loss is that of the sample whose target it has.
        """
        self.clear()
        self.error, self.paused, self.shadows, self.is_packed = None, False, shadows, is_packed
        rows = list(rows)
        self._row_owners = row_owners(rows) if is_packed else None
        for tensor, owners in rows:
            self._known[id(tensor)] = _Known(weakref.ref(tensor), Rows((owners,)), "batch")
        if not self.entered:
            never_compile_alone(StepWatch.__torch_function__)
            super().__enter__()  # type: ignore[no-untyped-call]
            self.entered = True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leaves the mode for a while, unless another mode was entered within it."""
        if not self.entered or torch.overrides._get_current_function_mode() is not self:
            yield
            return
        self.stop()
        try:
            yield
        finally:
            super().__enter__()  # type: ignore[no-untyped-call]
            self.entered = True

    def stop(self) -> None:
        """Leaves the mode. What was seen stays, until `clear`."""
        if self.entered:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.entered = False

    def release(self) -> None:
        """Forgets the operands of reductions, as large as the logits, before a backward needs the memory."""
        self.seen.reductions.clear()
        self.seen.without_graph.clear()

    def clear(self) -> None:
        """Forgets what was seen."""
        self.seen = Watched()
        self.shadows = None
        self._known.clear()
        self._factors.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            return self._followed(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in RECORDERS:
            with torch.no_grad():
                target = args[1] if len(args) > 1 else kwargs["target"]
                self.seen.compiled.append((RECORDERS[func](*args, **kwargs), target.detach()))
        return result

    @torch._disable_dynamo  # type: ignore[attr-defined,untyped-decorator]
    def _followed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # In a backward, a checkpointed forward runs again: no new loss.
        if self.paused or torch._C._current_graph_task_id() != -1:
            return func(*args, **kwargs)
        before = self._before(func, args)
        result = func(*args, **kwargs)
        self.paused = True
        try:
            self._note(func, args, kwargs, result, before)
        except Exception as error:
            self.error = self.error or error
        finally:
            self.paused = False
        return result

    def provenance_of(self, tensor: Tensor) -> Provenance | None:
        """Whose elements a tensor has; None for a constant."""
        known = self.known(tensor)
        if known is not None:
            return known.provenance
        node = tensor.grad_fn if tensor.requires_grad else None
        return None if node is None else Lost(f"{node.name()}, whose rows can't be followed")

    def known(self, tensor: Any) -> _Known | None:
        """What is known of a tensor of the step."""
        known = self._known.get(id(tensor))
        return known if known is not None and known.tensor() is tensor else None

    def note_same_rows(self, source: Tensor, result: Tensor) -> None:
        """Notes a result whose rows are those of its source, of what was computed without the mode."""
        if isinstance(result, Tensor) and result.shape == source.shape:
            self._remember("", (source,), {}, [result], self.provenance_of(source))

    def _before(self, func: Any, args: Any) -> Tensor | None:
        """A copy of the tensor that ``func`` is about to change, where its shadow will need it."""
        if self.shadows is None or not args or not isinstance(args[0], Tensor) or not changes_in_place(func):
            return None
        return args[0].detach().clone() if self.shadows.touches(args) else None

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, before: Tensor | None) -> None:
        results = tensors_in([result])
        if results and torch._C._functorch.is_functorch_wrapped_tensor(results[0]):  # void outside of vmap
            return
        name = getattr(func, "__name__", "")
        provenance_of = self.provenance_of
        changes = changes_in_place(func)
        if changes and args and self.known(args[0]) is None:  # unknown before, so a constant; now it has a graph
            first = args[0]
            provenance_of = lambda tensor: None if tensor is first else self.provenance_of(tensor)  # noqa: E731
        if self._row_owners is not None and not self.seen.attends_across:
            self.seen.attends_across = attends_across(name, args, kwargs, result, self._row_owners)
        if self.is_packed:
            found: Any = self._followed_in_rows(func, args, kwargs, result, provenance_of)
        else:
            found = follow(func, args, kwargs, result, provenance_of)
        if changes and args and not results:
            results = [args[0]]
        if results and changes:
            self._forget_base(results[0], found)
        if results:
            self._remember(name, args, kwargs, results, found)
        reduced = self._reduced(func, name, args, kwargs, result)
        if self.shadows is not None:
            node = self.shadows.note(func, args, kwargs, result, before, is_leaf=reduced is not None)
        else:
            node = result.grad_fn if reduced is not None else None
        if reduced is not None and node is not None:
            self.seen.reductions[node] = reduced
        elif reduced is not None:
            self.seen.without_graph.append((result, reduced))
        if results and results[0].ndim:
            self._factors.note(func, name, args, kwargs, results[0])

    def _remember(self, name: str, args: Any, kwargs: Any, results: list[Tensor], found: Any) -> None:
        provenances = found if isinstance(found, list) else [found] * len(results)
        if all(each is None for each in provenances) and not any(each.requires_grad for each in results):
            for result in results:
                self._known.pop(id(result), None)
            return
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        inputs = [known for each in tensors if (known := self.known(each)) is not None]
        first = inputs[0].name if inputs and name in KEEPS_NAME else ""
        is_dynamic = any(known.is_dynamic for known in inputs) or (
            name in DYNAMIC and _reorders(tensors, inputs, provenances)
        )
        for result, provenance in zip(results, provenances, strict=False):
            self._known[id(result)] = _Known(weakref.ref(result), provenance, first or name, is_dynamic)

    def _followed_in_rows(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, provenance_of: ProvenanceOf
    ) -> Any:
        """Provenance where rows hold several samples: what parameters have touched has none of its own."""
        tensors = tensors_in([args, list(kwargs.values())])
        is_of_model = any(isinstance(tensor, nn.Parameter) for tensor in tensors)
        found: Any = None
        if not is_of_model:
            found = follow(func, args, kwargs, result, lambda tensor: _if_known(provenance_of(tensor)))
            is_of_model = any(isinstance(provenance_of(tensor), Lost) for tensor in tensors)
        if found is not None or not is_of_model:
            return found
        opaque = Lost(PACKED)
        return opaque if isinstance(result, Tensor) else [opaque] * len(tensors_in([result]))

    def _forget_base(self, view: Tensor, found: Any) -> None:
        """Loses the rows of a tensor that was changed through ``view``, unless they are what they were."""
        base = view._base
        before = None if base is None else self.known(view)
        if base is None or (before is None and found is None):
            return
        same = before is not None and isinstance(before.provenance, Rows) and isinstance(found, Rows)
        if same and all(map(torch.equal, before.provenance.candidates, found.candidates)):  # type: ignore[union-attr]
            return
        lost = Lost("a tensor that was changed through a view of it")
        self._known[id(base)] = _Known(weakref.ref(base), lost, "")

    def _reduced(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> Reduced | None:
        if not isinstance(result, Tensor) or result.ndim or not result.is_floating_point():
            return None
        if has_reduction(func):
            return Reduced(func, tuple(args), dict(kwargs), name, (), versions(args))
        operand = args[0] if args else kwargs.get("input")
        if name not in REDUCTIONS or not isinstance(operand, Tensor) or not operand.ndim:
            return None
        known = self.known(operand)
        factors = self._factors.of(operand)
        made_by = "" if known is None else known.name
        is_loss = has_reduction(getattr(functional, made_by, None))
        loss = made_by if is_loss else f"{name} of {made_by or 'a tensor'}"
        return Reduced(func, (operand,), {}, loss, factors, versions((operand,)))


def _if_known(provenance: Provenance | None) -> Provenance | None:
    return provenance if isinstance(provenance, Rows) else None


def _reorders(tensors: list[Tensor], inputs: list[_Known], provenances: list[Any]) -> bool:
    """Whether a tensor that is an index picks among the first input's samples, or changes their order."""
    indexes = [each for each in tensors if not each.is_floating_point()]
    source = inputs[0].provenance if inputs else None
    if not indexes or not isinstance(source, Rows):
        return bool(indexes)
    before = [each.flatten().tolist() for each in source.candidates]
    after = [each.flatten().tolist() for found in provenances if isinstance(found, Rows) for each in found.candidates]
    return before[: len(after)] != after
