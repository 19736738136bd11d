"""Feature maps that know which pixels matter: tensor subclasses of logical shape (N, C, H, W).

Both storages keep a `value` whose channels are dimension 1, so that pointwise operations and normalisation are
the same call on either:

- `MaskedFeatures`: the value is the unmasked dense map (N, C, H, W); what reads over space reads zeros at
  inactive pixels. The reference, and training where the mask takes gradient.
- `SparseFeatures`: the value is (1, C, n, 1), one row of channels per active site, channels innermost.

Every operation arrives at `__torch_function__`; `RULES` says what it does to guided features, and an operation
without a rule leaves the region: it gets ordinary tensors, zero at inactive pixels, and is reported.

Autograd runs through the values. Operations that PyTorch calls below `__torch_function__` (custom autograd
Functions, activation checkpointing) see the wrapper itself, so the wrapper has a place of its own in the graph,
tied to its value by `_Enter`, `_Leave` and `_Rebase`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsenet.selection import Operation, Selection, kept_from_checkpoints
from sparsenet.sites import ActiveSites, Pair

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Function, as `__torch_function__` sees it, to `rule(func, *args, **kwargs)`; filled by `sparsenet.rules`."""


class Leaves(Exception):
    """Raised by a rule that cannot keep these arguments guided; its text is the reason."""


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for functions."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return register


@dataclass
class _Passage:
    """Where a wrapper's gradient would be wrong: the operation that read it masked where autograd was off."""

    unseen: str | None = None


class Features(torch.Tensor):
    """A guided feature map. Not made by users: a selective model's embed stage gives it to the modules after it.

    `full` features still have every pixel (at the entry, and after pointwise operations on the entry), so that
    the first operation that reads over space reads real context.
    """

    selection: Selection
    full: bool
    fill: Tensor | None
    grid: Pair
    _value: Tensor
    _passage: _Passage
    _live: bool
    _tied: bool  # in the graph by its mask only, not by its value
    _read: tuple[bool, Tensor] | None
    _lent: list[tuple[Tensor, int]]

    # -- construction ------------------------------------------------------------------------------------------

    @classmethod
    def make(
        cls,
        value: Tensor,
        selection: Selection,
        grid: Pair,
        *,
        full: bool,
        fill: Tensor | None = None,
        live: bool = True,
    ) -> Features:
        """Features of a value.

        Args:
            value: the storage's value, channels in dimension 1.
            grid: (H, W) of the map.
            fill: what inactive pixels hold when the features leave the region, (C,); zero if `None`.
            live: whether reading through the mask gives the mask gradient.
        """
        if torch.is_grad_enabled():
            # Where the mask alone takes gradient, the wrapper is in the graph too, so that losing it is noticed.
            tie = None if value.requires_grad else cls._gate(selection, grid, live)
            if value.requires_grad or tie is not None:
                return _Enter.apply(value, tie, cls, selection, grid, full, fill, live)
        return cls._wrap(value, selection, grid, full, fill, live)

    @classmethod
    def _wrap(
        cls, value: Tensor, selection: Selection, grid: Pair, full: bool, fill: Tensor | None, live: bool
    ) -> Features:
        shape = (selection.batch, value.shape[1], *grid)
        features: Features = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=value.dtype, device=value.device)
        features._value = value
        features.selection = selection
        features.grid = grid
        features.full = full
        features.fill = fill
        features._live = live
        features._passage = _Passage()
        features._tied = False
        features._read = None
        features._lent = []
        return features

    def like(self, value: Tensor, live: bool | None = None) -> Features:
        """Features of the same sites with another value, as a pointwise operation gives them."""
        live = self._live if live is None else live
        return type(self).make(value, self.selection, self.grid, full=self.full, live=live)

    def replace(self, value: Tensor, full: bool) -> Features:
        """This very object with another value, as an in-place operation leaves it."""
        self._value = value
        self.full = full
        self.fill = None
        self._read = None
        if torch.is_grad_enabled() and (value.requires_grad or _requires_grad(self)):
            _Rebase.apply(self, value)
        return self

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def value(self) -> Tensor:
        """The storage's value, attached to the autograd graph."""
        for lent, version in self._lent:
            if lent._version != version:
                raise RuntimeError(
                    "a view of a guided feature map was written to after the map had left the guided region: the "
                    "write would be lost. Write to the map itself, or call .clone() before taking the view"
                )
        if torch.is_grad_enabled() and not (self._value.requires_grad or self._tied) and _requires_grad(self):
            return _Leave.apply(self)
        return self._value

    @property
    def sites(self) -> ActiveSites:
        """The sites that the features must be right at: all of them if `full`."""
        return self.selection.everywhere(self.grid) if self.full else self.selection.sites(self.grid)

    @property
    def gate(self) -> Tensor | None:
        return self._gate(self.selection, self.grid, self._live)

    @classmethod
    def _gate(cls, selection: Selection, grid: Pair, live: bool) -> Tensor | None:
        return None

    def restricted(self) -> Tensor:
        """The value at the active sites only, whether `full` or not."""
        raise NotImplementedError

    def operand(self, other: Tensor, full: bool) -> Tensor:
        """An ordinary tensor that broadcasts against (N, C, H, W), as it broadcasts against a value."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """The ordinary tensor (N, C, H, W) of full features, no pixel masked."""
        raise NotImplementedError

    def _masked(self) -> Tensor:
        raise NotImplementedError

    def _filled(self, fill: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, reader: str) -> Tensor:
        """The ordinary tensor (N, C, H, W), zero (or `fill`) at inactive pixels, for `reader` to read."""
        self.note_reading(reader)
        return self._masked() if self.fill is None or self.gate is not None else self._filled(self.fill)

    def note_reading(self, reader: str) -> None:
        """Reading through the mask where autograd does not look: should a gradient come back to the wrapper all
        the same (a custom Function's backward), it would be of the map without its mask. `_Enter` raises then."""
        if not torch.is_grad_enabled() and _requires_grad(self) and (self.full or self.gate_is_live()):
            self._passage.unseen = self._passage.unseen or reader

    def gate_is_live(self) -> bool:
        return False

    # -- dispatch ----------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        function = RULES.get(func)
        if function is None:
            return leave(func, args, kwargs, "no rule for this operation")
        try:
            return function(func, *args, **kwargs)
        except Leaves as reason:
            return leave(func, args, kwargs, str(reason))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operations called below `__torch_function__`: custom Functions, scripted functions, autograd itself."""
        first = args[0] if args else None
        if func is torch.ops.aten.detach.default or func is torch.ops.aten.alias.default:
            assert isinstance(first, Features)
            return type(first)._wrap(first._value.detach(), first.selection, first.grid, first.full, None, first._live)
        if func._schema.is_mutable:
            raise RuntimeError(_in_place_message(str(func)))
        reason = "called below torch functions, by a custom autograd Function or in C++"
        with torch.no_grad():  # whatever the mode says, nothing is recorded here, and what is cached must know
            if func is torch.ops.aten.add.Tensor:  # autograd sums the gradients of two readers
                return cls.__torch_function__(torch.add, types, args, kwargs)
            return leave(func, args, kwargs or {}, reason)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = (self.selection.batch, self._value.shape[1], *self.grid)
        return f"{type(self).__name__}(shape={shape}, active={len(self.selection.sites(self.grid))}, full={self.full})"


class MaskedFeatures(Features):
    """The unmasked dense map and its selection: see the module's text."""

    def restricted(self) -> Tensor:
        return self.value

    def whole(self) -> Tensor:
        return self.value

    def operand(self, other: Tensor, full: bool) -> Tensor:
        return other

    @classmethod
    def _gate(cls, selection: Selection, grid: Pair, live: bool) -> Tensor | None:
        return selection.gate(grid) if live else None

    def gate_is_live(self) -> bool:
        return self._live and self.selection.levels.gate(self.grid) is not None

    def _masked(self) -> Tensor:
        """Zero at inactive pixels: made once per tensor. Multiplying here, and not after every operation, leaves the
        mask a gradient at inactive pixels, so that pixels once switched off can return."""
        value, recording = self.value, torch.is_grad_enabled()
        if self._read is None or self._read[0] != recording:
            with kept_from_checkpoints():
                gate = self.gate
                masked = (
                    torch.where(self.selection.mask(self.grid), value, value.new_zeros(()))
                    if gate is None
                    else value * gate.to(value.dtype)
                )
            self._read = (recording, masked)
        return self._read[1]

    def _filled(self, fill: Tensor) -> Tensor:
        return torch.where(self.selection.mask(self.grid), self.value, fill[:, None, None].to(self.value))

    def read(self, reader: str) -> Tensor:
        """What `reader`, an operation over space, sees: everything of full features, zeros at inactive pixels else."""
        if self.full:
            return self.value
        self.note_reading(reader)
        return self._masked()


class SparseFeatures(Features):
    """One row of channels per site: see the module's text."""

    @classmethod
    def of_rows(
        cls, rows: Tensor, selection: Selection, grid: Pair, *, full: bool = False, fill: Tensor | None = None
    ) -> Features:
        """Features of rows (n, C)."""
        return cls.make(_as_value(rows), selection, grid, full=full, fill=fill)

    @property
    def rows(self) -> Tensor:
        """The rows (n, C) of `sites`."""
        return as_rows(self.value)

    def surrounded(self, outside: float = 0.0) -> Tensor:
        """The rows, and beneath them what a kernel map points to where there is none: zeros for inactive pixels and
        `outside` for places outside the image, (n + 2, C)."""
        rows, recording = self.rows, torch.is_grad_enabled()
        if outside:
            rows = F.pad(rows, (0, 0, 0, 2))
            rows[-1] = outside
            return rows
        if self._read is None or self._read[0] != recording:  # made once for all that read these features
            with kept_from_checkpoints():
                self._read = (recording, F.pad(rows, (0, 0, 0, 2)))
        return self._read[1]

    def restricted(self) -> Tensor:
        if not self.full:
            return self.value
        return _as_value(self.rows.index_select(0, self.selection.sites(self.grid).index))

    def operand(self, other: Tensor, full: bool) -> Tensor:
        if other.numel() == 1 and other.dim() < 3:
            return other
        other = other[(None,) * (4 - other.dim())]
        sites = self.selection.everywhere(self.grid) if full else self.selection.sites(self.grid)
        if other.shape[2:] == (1, 1) != self.grid:
            if other.shape[0] == 1:
                return other
            return _as_value(other[:, :, 0, 0].index_select(0, sites.image))
        pixels = other.expand(self.selection.batch, -1, *self.grid).permute(0, 2, 3, 1).flatten(0, 2)
        return _as_value(pixels if full else pixels.index_select(0, sites.index))

    def whole(self) -> Tensor:
        return self.rows.view(self.selection.batch, *self.grid, -1).permute(0, 3, 1, 2)

    def _masked(self) -> Tensor:
        return self._filled(self._value.new_zeros(()))

    def _filled(self, fill: Tensor) -> Tensor:
        rows = as_rows(self.restricted())
        batch, (height, width) = self.selection.batch, self.grid
        dense = fill.to(rows).expand(batch * height * width, rows.shape[1]).clone(memory_format=torch.contiguous_format)
        dense.index_copy_(0, self.selection.sites(self.grid).index, rows)
        return dense.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _as_value(rows: Tensor) -> Tensor:
    """Rows (n, C) as (1, C, n, 1), a channels-last view: no copy.

    In the strides of the sides of length 1 too: PyTorch's batch norm on CPU takes `rows.T[None, :, :, None]` for
    contiguous and its gradient for channels-last, and the result is wrong without an error.
    """
    return rows[None, :, None].permute(0, 3, 1, 2)


def as_rows(value: Tensor) -> Tensor:
    """The value (1, C, n, 1) of `SparseFeatures` as rows (n, C): no copy of a channels-last one."""
    return value.permute(0, 2, 3, 1).flatten(0, 2)


def _requires_grad(features: Features) -> bool:
    """Whether the wrapper itself, not its value, is in the autograd graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return features.requires_grad


# -- leaving the region ----------------------------------------------------------------------------------------


def leave(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    """Call `func` on ordinary tensors in place of guided ones, and report it.

    Raises:
        RuntimeError: for an operation that would write in place into guided features, and for any exit under
            `selectify(strict=True)`.
    """
    name = name_of(func)
    nested = any(isinstance(argument, tuple | list | dict) for argument in (*args, *kwargs.values()))
    leaves = tree_leaves((args, kwargs)) if nested else [*args, *kwargs.values()]
    leaving = [leaf for leaf in leaves if isinstance(leaf, Features)]
    if _writes_to_features(func, args, kwargs):
        raise RuntimeError(_in_place_message(name))
    selection, grid = leaving[0].selection, leaving[0].grid
    if selection.strict:
        raise RuntimeError(
            f"{name} leaves the guided region ({reason}), which selectify(strict=True) forbids: embed at a later "
            "stage, or use strict=False to let it run dense"
        )
    selection.report(Operation(name, "exit", grid, reason=reason))
    dense = {id(features): features.dense(name) for features in leaving}
    if func is Tensor.view and args[0] is leaving[0]:
        with suppress(RuntimeError):  # detection heads split the channels, which needs no copy in any memory format
            view = func(dense[id(leaving[0])], *args[1:], **kwargs)
            _lend(leaving[0], dense[id(leaving[0])], view)
            return view
    # Contiguous, as the wrappers' own strides say: `x.view(len(x), -1)` would refuse the rows' order.
    dense = {key: tensor.contiguous() for key, tensor in dense.items()}
    args, kwargs = tree_map_only(Features, lambda features: dense[id(features)], (args, kwargs))
    result = func(*args, **kwargs)
    for features in leaving:
        _lend(features, dense[id(features)], result)
    return result


def _lend(features: Features, dense: Tensor, result: Any) -> None:
    """Remember a view of the features that went out, so that a later write to it is noticed, not lost.

    Inference tensors have no version counter; there the write goes unnoticed by PyTorch itself too.
    """
    if dense.is_inference():
        return
    memory = dense.untyped_storage().data_ptr()
    results = [result] if isinstance(result, Tensor) else tree_leaves(result)
    if any(isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == memory for leaf in results):
        features._lent.append((dense, dense._version))


# Some of these functions are nameless dispatchers on a flag, such as `return_indices`.
_FUNCTIONAL = {function: f"F.{name}" for name, function in vars(F).items() if callable(function) and name[0] != "_"}


def name_of(func: Any) -> str:
    """A function's name as a reader knows it: `Tensor.view`, `torch.flatten`, `F.interpolate`."""
    if func in _FUNCTIONAL:
        return _FUNCTIONAL[func]
    name = getattr(func, "__name__", None) or str(func)
    if name in ("__get__", "__set__"):
        return f"Tensor.{getattr(func.__self__, '__name__', 'attribute')}"
    name = str(getattr(func, "__qualname__", name))
    for internal, known in (("_VariableFunctionsClass", "torch"), ("_TensorBase", "Tensor"), ("TensorBase", "Tensor")):
        name = name.replace(internal, known)
    return name


_OPERATORS = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "xor",
    "or",
)
_WRITING = {*(f"__i{name}__" for name in _OPERATORS), "__setitem__", "__set__", "__delitem__"}


def _writes_to_features(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("out") is not None and any(isinstance(leaf, Features) for leaf in tree_leaves(kwargs["out"])):
        return True
    if not args or not isinstance(args[0], Features):
        return False
    name = getattr(func, "__name__", "")
    if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
        return True
    position = _inplace_argument(func)
    return bool(kwargs.get("inplace") or (position is not None and len(args) > position and args[position]))


@cache
def _inplace_argument(func: Any) -> int | None:
    """The position of a function's argument `inplace`, if it has one. A builtin has no signature: its name tells."""
    try:
        parameters = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _in_place_message(name: str) -> str:
    return (
        f"{name} would write in place into guided features, and sparsenet has no rule for it: the write would be "
        "lost. Use the out-of-place operation, or embed at a later stage"
    )


# -- autograd between a wrapper and its value ------------------------------------------------------------------


def _value_gradient(
    features_type: type[Features], selection: Selection, grid: Pair, full: bool, grad: Tensor
) -> Tensor:
    """The gradient of a value from the gradient (N, C, H, W) of its wrapper."""
    if isinstance(grad, Features):  # from a custom Function that computes with what it has saved
        grad = grad.whole() if grad.full else grad.dense("backward")
    if features_type is SparseFeatures:
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
        return _as_value(rows if full else rows.index_select(0, selection.sites(grid).index))
    return grad if full else torch.where(selection.mask(grid), grad, grad.new_zeros(()))


class _Enter(torch.autograd.Function):
    """value -> wrapper; `tie`, if given, is there to be in the graph only."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        tie: Tensor | None,
        cls: type[Features],
        selection: Selection,
        grid: Pair,
        full: bool,
        fill: Tensor | None,
        live: bool,
    ) -> Features:
        features = cls._wrap(value, selection, grid, full, fill, live)
        features._tied = tie is not None
        ctx.place = (cls, selection, grid, full)
        ctx.passage = features._passage
        return features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _arriving(ctx, grad), None, None, None, None, None, None, None


class _Rebase(torch.autograd.Function):
    """wrapper, its new value -> the same wrapper, after an in-place operation."""

    @staticmethod
    def forward(ctx: Any, features: Features, value: Tensor) -> Features:
        ctx.mark_dirty(features)
        ctx.place = (type(features), features.selection, features.grid, features.full)
        ctx.passage = features._passage
        return features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _arriving(ctx, grad)


def _arriving(ctx: Any, grad: Tensor) -> Tensor:
    if ctx.passage.unseen is not None:
        raise RuntimeError(
            f"{ctx.passage.unseen} read guided features through their mask inside a custom autograd Function, a "
            "scripted function or a reentrant checkpoint, where the mask's part of the gradient would be lost: use "
            "use_reentrant=False, run it in Python, or embed at a later stage"
        )
    features_type, selection, grid, full = ctx.place
    return _value_gradient(features_type, selection, grid, full, grad)


class _Leave(torch.autograd.Function):
    """wrapper -> value, where only the wrapper is in the graph: the output of a custom Function or a checkpoint."""

    @staticmethod
    def forward(ctx: Any, features: Features) -> Tensor:
        ctx.place = (type(features), features.selection, features.grid, features.full)
        return features._value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        features_type, selection, grid, full = ctx.place
        if features_type is not SparseFeatures:
            return grad
        rows = as_rows(grad)
        sites = selection.everywhere(grid) if full else selection.sites(grid)
        dense = rows.new_zeros(selection.batch * grid[0] * grid[1], rows.shape[1]).index_copy(0, sites.index, rows)
        return dense.view(selection.batch, *grid, -1).permute(0, 3, 1, 2)
