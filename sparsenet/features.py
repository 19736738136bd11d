"""Feature maps that know which pixels matter: tensor subclasses of logical shape (N, C, H, W), or whatever a `Form`
makes of it.

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

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef

from sparsenet.backends import indirect, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.calls import is_in_place, name_of
from sparsenet.form import Form
from sparsenet.kernels import queue
from sparsenet.selection import Operation, Selection, kept_from_checkpoints
from sparsenet.sites import ActiveSites, Pair
from sparsenet.work import Readers, Work

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Function, as `__torch_function__` sees it, to `rule(func, *args, **kwargs)`; filled by `sparsenet.rules`."""


# What an operation gives that reads no pixel of a map.
_DESCRIPTIONS = (bool, int, torch.Size, torch.dtype, torch.device)

# The lowest fill where the mask takes gradient, which is of the size of the difference between a pixel's own value and
# its fill. As a class score it still means never (5e-5 by softmax or sigmoid), and as the logarithm of a box's extent
# 5e-5 of its anchor's.
LOWEST_LIVE_FILL = -10.0


class Leaves(Exception):
    """Raised by a rule that cannot keep these arguments guided; its text is the reason."""


def rule(*functions: Any, any_form: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for functions. Unless it takes maps of `any_form`, others leave before it sees them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, function if any_form else _of_plain_maps(function)))
        return function

    return register


def _of_plain_maps(function: Rule) -> Rule:
    @wraps(function)
    def checked(func: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Features) and not argument.form.plain:
                raise Leaves(argument.form.description)
        return function(func, *args, **kwargs)

    return checked


@dataclass
class _Passage:
    """Where a wrapper's gradient would be wrong: the operation that read it masked where autograd was off."""

    unseen: str | None = None


class _Memory:
    """What the wrappers that are views of one another share, because a write to one is a write to all.

    Where PyTorch has a view and sparsenet a copy (rows in another order of channels, a crop), a write to one makes the
    others `lost`: they raise when they are next read.
    """

    def __init__(self, copies: list[_Memory] | None = None) -> None:
        self.writes = 0
        self.lost = False
        self.wrappers: list[TensorWeakRef] = []
        self.copies = [] if copies is None else copies
        self.copies.append(self)

    def alive(self) -> list[Features]:
        """The wrappers that share this memory."""
        return [wrapper for reference in self.wrappers if (wrapper := reference()) is not None]

    def written(self) -> None:
        self.writes += 1
        for other in self.copies:
            other.lost = other.lost or other is not self
        self.copies = [self]


class Features(torch.Tensor):
    """A guided feature map. Not made by users: a selective model's embed stage gives it to the modules after it.

    `full` features still have every pixel (at the entry, and after pointwise operations on the entry), so that
    the first operation that reads over space reads real context.
    """

    selection: Selection
    full: bool
    fill: Tensor | None
    grid: Pair
    form: Form
    _held: Tensor | None  # the value, if it is made
    # Most features need none of these, and a frozen network makes hundreds of features in a pass.
    _rows: Tensor | None = None  # a layer's rows, of which the value can be made
    _work: Work | None = None  # what computes it, in a frozen model
    _passage: _Passage | None = None
    _live: bool
    _tied: bool = False  # in the graph by its mask only, not by its value
    _read: tuple[bool, int, Tensor] | None = None
    _lent: list[tuple[Tensor, int]]
    _readers: Readers  # of the value; the same for all views
    _shared: _Memory | None = None

    # -- what rules and models ask most, without the way through PyTorch's dispatch ------------------------------

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self.form.shape(self.selection.batch, self.grid))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        for tensor in (self._held, self._rows):
            if tensor is not None:
                return tensor.dtype
        assert self._work is not None
        return self._work.dtype

    def dim(self) -> int:
        return len(self.form.order)

    def numel(self) -> int:
        return prod(self.form.shape(self.selection.batch, self.grid))

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
        live: bool | None = None,
        form: Form | None = None,
    ) -> Features:
        """Features of a value.

        Args:
            value: the storage's value, channels in dimension 1.
            grid: (H, W) of the map.
            fill: what inactive pixels hold when the features leave the region, (C,); zero if `None`.
            live: whether reading through the mask gives the mask gradient, where masks take any; `None`: unless the
                pass leaves that to certain layers.
            form: how its logical dimensions lie; (N, C, H, W) if `None`.
        """
        form = Form.plain_of(value.shape[1]) if form is None else form
        live = selection.live_layers is None if live is None else live
        if torch.is_grad_enabled():
            # Where the mask alone takes gradient, the wrapper is in the graph too, so that losing it is noticed.
            tie = None if value.requires_grad or not live else cls._gate(selection, grid, live)
            if value.requires_grad or tie is not None:
                return _Enter.apply(value, tie, cls, selection, grid, full, fill, live, form)
        return cls._wrap(value, selection, grid, full, fill, live, form)

    @classmethod
    def _wrap(
        cls,
        value: Tensor,
        selection: Selection,
        grid: Pair,
        full: bool,
        fill: Tensor | None,
        live: bool,
        form: Form,
    ) -> Features:
        cls = UnguidedFeatures if selection.everything else cls
        shape = form.shape(selection.batch, grid)
        features: Features = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=value.dtype, device=value.device)
        features._held = value
        features.selection = selection
        features.grid = grid
        features.form = form
        features.full = full
        features.fill = fill
        features._live = live
        features._lent = []
        features._readers = Readers(layers_only=False)
        return features

    @classmethod
    def deferred(
        cls, work: Work, selection: Selection, grid: Pair, *, full: bool, fill: Tensor | None, form: Form | None = None
    ) -> Features:
        """Features whose value is computed when it is first read."""
        form = Form.plain_of(work.outputs) if form is None else form
        features = cls._wrap(work.reads.rows, selection, grid, full, fill, True, form)
        features._held = None
        features._work = work
        features._readers.layers_only = True
        return features

    @classmethod
    def of_kernel(cls, rows: Tensor, selection: Selection, grid: Pair, *, full: bool, form: Form) -> Features:
        """Features of rows (n, C), contiguous, that a kernel writes which may wait, and nothing else has seen."""
        features = cls._wrap(rows, selection, grid, full, None, True, form)
        features._held, features._rows = None, rows
        features._readers.layers_only = True
        return features

    def then(self, epilogue: Epilogue | None, into: Features | None = None) -> Features | None:
        """These features after a step more of their layer's work, which has this epilogue then, or `None` where it
        cannot be part of it.

        Args:
            into: what an in-place operation leaves it in; new features if `None`.
        """
        if into is not None and not into.alone:
            return None
        following = None if self._work is None else self._work.then(epilogue)
        if following is None:
            return None
        if into is not None:
            return into.becomes(following, self.full)
        return self.deferred(following, self.selection, self.grid, full=self.full, fill=None, form=self.form)

    def like(self, value: Tensor, live: bool | None = None, form: Form | None = None) -> Features:
        """Features of the same sites with another value, as a pointwise operation gives them."""
        live = self._live if live is None else live
        if form is None:
            form = self.form if value.shape[1] == self._value.shape[1] else Form.plain_of(value.shape[1])
        return type(self).make(value, self.selection, self.grid, full=self.full, live=live, form=form)

    def as_view(self, value: Tensor, form: Form, fill: Tensor | None = None) -> Features:
        """Features of the same sites that PyTorch calls a view of these: a write to one must not be lost on the other.
        Where `value` is a copy, a write to either makes the other raise at its next use. `fill` is this one's fill as
        the view has it: a head's convolution is viewed by anchors and classes before it leaves the region."""
        view = self.viewed_by(self.like(value, form=form))
        view.fill = fill
        return view

    def in_form(self, form: Form, fill: Tensor | None = None) -> Features:
        """A view of the same channels in another form: of what a layer has yet to compute, too."""
        if self._held is not None:
            return self.as_view(self.value, form, fill)
        self._check_writes()
        rows = self._rows if self._work is None else self._work.reads.rows
        assert rows is not None
        view = self._wrap(rows, self.selection, self.grid, self.full, fill, self._live, form)
        view._held, view._rows, view._work = None, self._rows, self._work
        view._joins(self._memory)
        view._lent, view._readers = self._lent, self._readers
        return view

    def viewed_by(self, view: Features) -> Features:
        """`view`, once it is known as a view of these features."""
        if _memory_of(view._value) == _memory_of(self._value):
            view._joins(self._memory)
        else:
            view._joins(_Memory(self._memory.copies))
        view._lent, view._readers = self._lent, self._readers
        return view

    def sibling(self, form: Form) -> Features:
        """Features of the same value that PyTorch calls a copy: a write to one makes the other raise."""
        copy = self.like(self.value, form=form)
        copy._joins(_Memory(self._memory.copies))
        copy._readers = self._readers
        return copy

    def replace(self, value: Tensor, full: bool) -> Features:
        """This very object with another value, as an in-place operation leaves it."""
        moved = _memory_of(value) != _memory_of(self._value) or full != self.full
        self._memory.lost = moved  # for the views that still read what was
        self._memory.written()
        if moved:
            self._joins(_Memory())
        self._value = value
        self.full = full
        self.fill = None
        self._read = None
        if torch.is_grad_enabled():
            for wrapper in self._memory.alive():  # views of this one have another place in the graph now, too
                if wrapper._value.requires_grad or _requires_grad(wrapper):
                    _Rebase.apply(wrapper, wrapper._value)
        return self

    def becomes(self, work: Work, full: bool) -> Features:
        """This very object as what an in-place operation leaves, which is not computed yet."""
        if self._shared is not None:
            self._shared.written()
        self._held, self._rows, self._work, self._read = None, None, work, None
        self.full, self.fill = full, None
        return self

    @property
    def alone(self) -> bool:
        """Whether no other features share its memory, or are copies of it that PyTorch calls views."""
        shared = self._shared
        return not self._lent and (shared is None or (len(shared.alive()) == 1 and len(shared.copies) == 1))

    @property
    def _writes(self) -> int:
        """How often its memory was written to."""
        return 0 if self._shared is None else self._shared.writes

    def writable(self) -> Tensor:
        """The value, to be written to. What is still to be computed from it is computed first."""
        for reference in self._readers.waiting:
            work = reference()
            if work is not None:
                work.result()
        self._readers.waiting.clear()
        return self.value

    def read_by(self, work: Work) -> None:
        """Work that will read the value when it is computed."""
        self._readers.waiting.append(ref(work))
        work.read_from.append(self._readers)

    @property
    def _memory(self) -> _Memory:
        if self._shared is None:
            self._joins(_Memory())
        assert self._shared is not None
        return self._shared

    def _joins(self, memory: _Memory) -> None:
        self._shared = memory
        memory.wrappers.append(TensorWeakRef(self))

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def _value(self) -> Tensor:
        if self._held is None:
            self._held = self._of_result(self._result())
            self._readers.layers_only = False
            self.selection.finish()
        return self._held

    @_value.setter
    def _value(self, value: Tensor) -> None:
        self._held, self._rows, self._work = value, None, None
        self._readers.layers_only = False

    def _result(self) -> Tensor:
        """The rows that a layer's work gives."""
        if self._rows is None:
            assert self._work is not None
            self._rows, self._work = self._work.result(), None
        return self._rows

    @property
    def has_value(self) -> bool:
        """Whether its value has been made, as it is not of what frozen layers give to one another."""
        return self._held is not None

    def settle(self) -> None:
        """Run the kernels that have come to read the value, unless they may wait, because nothing but layers has come
        by its memory."""
        if not (self._readers.layers_only and self.selection.waits):
            queue.finish()

    def computed(self) -> Tensor:
        """The value as rows (n, C), in `MaskedFeatures` one for each pixel, each contiguous: for a layer to read, whose
        kernels wait for those that have yet to write them."""
        self._check_writes()
        if self._held is None:
            rows = self._result()
            if not self.selection.waits:
                self.selection.finish()
            return rows
        if self._rows is not None:
            return self._rows
        value = self.value
        rows = as_rows(value)
        if rows.stride(1) == 1:
            return rows
        return as_rows(value.contiguous(memory_format=torch.channels_last))

    def _of_result(self, rows: Tensor) -> Tensor:
        """The value of a layer's rows."""
        raise NotImplementedError

    @property
    def value(self) -> Tensor:
        """The storage's value, attached to the autograd graph."""
        self._check_writes()
        if torch.is_grad_enabled() and not (self._value.requires_grad or self._tied) and _requires_grad(self):
            self._value = _Leave.apply(self)  # kept, so that what is written to views of it is part of the graph
        return self._value

    def _check_writes(self) -> None:
        """Raise for writes that would be lost."""
        for lent, version in self._lent:
            if lent._version != version:
                raise RuntimeError(
                    "a view of a guided feature map was written to after the map had left the guided region: the "
                    "write would be lost. Write to the map itself, or call .clone() before taking the view"
                )
        if self._shared is not None and self._shared.lost:
            raise RuntimeError(
                "a guided feature map was written to in place after this one was taken from it as a view, or the other "
                "way round, and sparsenet keeps the two apart: the write would be lost. Call .clone() before writing"
            )

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
        """An ordinary tensor that broadcasts against the map, as it broadcasts against its cells."""
        if other.numel() == 1 and other.dim() < 3:
            return other
        return self._operand(self.form.cells(other[(None,) * (len(self.form.order) - other.dim())]), full)

    def _operand(self, cells: Tensor, full: bool) -> Tensor:
        raise NotImplementedError

    def cells(self, value: Tensor) -> Tensor:
        """A value with its channel dimensions apart, as the form has them: (N or 1, *channels, H or n, W or 1)."""
        channels = self.form.channels
        if len(channels) == 1:
            return value
        return value.unflatten(1, channels) if channels else value[:, 0]

    def packed(self, cells: Tensor) -> Tensor:
        """The value of cells, their channel dimensions in one."""
        if cells.dim() == 4:
            return cells
        return cells.flatten(1, -3) if cells.dim() > 3 else cells[:, None]

    def whole(self) -> Tensor:
        """The ordinary tensor (N, C, H, W) of full features, no pixel masked."""
        raise NotImplementedError

    def _masked(self) -> Tensor:
        raise NotImplementedError

    def _filled(self, fill: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, reader: str, *, waits: bool = False) -> Tensor:
        """The ordinary tensor (N, C, H, W), zero (or `fill`) at inactive pixels, for `reader` to read.

        Args:
            waits: whether a kernel may have yet to write it, for which `Selection.finish` is called before it is read.
        """
        self.note_reading(reader)
        value = self._spread()
        if value is None:
            value = self._masked() if self.fill is None else self._filled(self.fill)
        elif not waits:
            self.selection.finish()
        return self.form.present(value)

    def _spread(self) -> Tensor | None:
        """The ordinary map (N, C, H, W), zero or `fill` at inactive pixels, by a kernel that may wait, or `None` where
        there is none."""
        return None

    def note_reading(self, reader: str) -> None:
        """Reading through the mask where autograd does not look: should a gradient come back to the wrapper all
        the same (a custom Function's backward), it would be of the map without its mask. `_Enter` raises then."""
        if not torch.is_grad_enabled() and _requires_grad(self) and (self.full or self.gate_is_live()):
            passage = self.passage
            passage.unseen = passage.unseen or reader

    @property
    def passage(self) -> _Passage:
        if self._passage is None:
            self._passage = _Passage()
        return self._passage

    def gate_is_live(self) -> bool:
        return False

    # -- dispatch ----------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(types) > 1:
            if Departed in types:
                args, kwargs = tree_map_only(Departed, Departed.ordinary, (args, kwargs))
            if UnguidedFeatures in types and (SparseFeatures in types or MaskedFeatures in types):
                args, kwargs = _met(args, kwargs)
        function = RULES.get(func)
        if function is None:
            return leave(func, args, kwargs, "no rule for this operation")
        try:
            result = function(func, *args, **kwargs)
        except Leaves as reason:
            return leave(func, args, kwargs, str(reason))
        tape = queue.tape()
        if tape is not None and not isinstance(result, _DESCRIPTIONS):
            tape.whole &= isinstance(result, Features) and result._work is not None
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operations called below `__torch_function__`: custom Functions, scripted functions, autograd itself."""
        first = args[0] if args else None
        if func is torch.ops.aten.detach.default or func is torch.ops.aten.alias.default:
            assert isinstance(first, Features)
            value = first._value.detach()
            return type(first)._wrap(value, first.selection, first.grid, first.full, None, first._live, first.form)
        if func._schema.is_mutable:
            raise RuntimeError(in_place_message(str(func)))
        reason = "called below torch functions, by a custom autograd Function or in C++"
        with torch.no_grad():  # whatever the mode says, nothing is recorded here, and what is cached must know
            if func is torch.ops.aten.add.Tensor:  # autograd sums the gradients of two readers
                return cls.__torch_function__(torch.add, types, args, kwargs)
            return leave(func, args, kwargs or {}, reason)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = self.form.shape(self.selection.batch, self.grid)
        return f"{type(self).__name__}(shape={shape}, active={len(self.selection.sites(self.grid))}, full={self.full})"


class MaskedFeatures(Features):
    """The unmasked dense map and its selection: see the module's text."""

    def _of_result(self, rows: Tensor) -> Tensor:
        return rows.view(self.selection.batch, *self.grid, rows.shape[1]).permute(0, 3, 1, 2)

    def restricted(self) -> Tensor:
        return self.value

    def whole(self) -> Tensor:
        return self.value

    def _operand(self, cells: Tensor, full: bool) -> Tensor:
        return cells

    @classmethod
    def _gate(cls, selection: Selection, grid: Pair, live: bool) -> Tensor | None:
        if live:
            return selection.gate(grid)
        gate = selection.gate(grid) if selection.soft else None
        return None if gate is None else gate.detach()

    def gate_is_live(self) -> bool:
        return self._live and self.selection.levels.gate(self.grid) is not None

    def _masked(self) -> Tensor:
        """Zero at inactive pixels: made once per tensor. Multiplying here, and not after every operation, leaves the
        mask a gradient at inactive pixels, so that pixels once switched off can return."""
        value, recording = self.value, torch.is_grad_enabled()
        if self._read is None or self._read[:2] != (recording, self._writes):
            with kept_from_checkpoints():
                gate = self.gate
                masked = (
                    torch.where(self.selection.mask(self.grid), value, value.new_zeros(()))
                    if gate is None
                    else value * gate.to(value.dtype)
                )
            self._read = (recording, self._writes, masked)
        return self._read[2]

    def _filled(self, fill: Tensor) -> Tensor:
        fill = fill[:, None, None].to(self.value)
        gate = self.gate
        if self.selection.live:
            fill = fill.clamp(min=LOWEST_LIVE_FILL)
        if gate is None:
            return torch.where(self.selection.mask(self.grid), self.value, fill)
        gate = gate.to(self.value.dtype)
        return self.value * gate + fill * (1 - gate)

    def read(self, reader: str) -> Tensor:
        """What `reader`, an operation over space, sees: everything of full features, zeros at inactive pixels else."""
        if self.full:
            return self.value
        self.note_reading(reader)
        return self._masked()


class UnguidedFeatures(MaskedFeatures):
    """What a frozen network computes without a mask, before the stage or behind an exit: an ordinary map to whatever
    guided features it meets."""

    def _masked(self) -> Tensor:
        return self.value


class SparseFeatures(Features):
    """One row of channels per site: see the module's text."""

    @classmethod
    def of_rows(
        cls,
        rows: Tensor,
        selection: Selection,
        grid: Pair,
        *,
        full: bool = False,
        fill: Tensor | None = None,
        form: Form | None = None,
    ) -> Features:
        """Features of rows (n, C)."""
        return cls.make(as_value(rows), selection, grid, full=full, fill=fill, form=form)

    def _of_result(self, rows: Tensor) -> Tensor:
        count, channels = rows.shape
        return rows.as_strided((1, channels, count, 1), (count * channels, 1, channels, channels))

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
        if self._read is None or self._read[:2] != (recording, self._writes):  # made once for all readers
            with kept_from_checkpoints():
                self._read = (recording, self._writes, F.pad(rows, (0, 0, 0, 2)))
        return self._read[2]

    def restricted(self) -> Tensor:
        if not self.full:
            return self.value
        return as_value(self.rows.index_select(0, self.selection.sites(self.grid).index))

    def _operand(self, cells: Tensor, full: bool) -> Tensor:
        sites = self.selection.everywhere(self.grid) if full else self.selection.sites(self.grid)
        channels, size = cells.shape[1:-2], tuple(cells.shape[-2:])
        value = super().packed(cells)  # not rows yet
        if size == (1, 1) != self.grid:
            if len(cells) == 1:
                return cells
            rows = value[:, :, 0, 0].index_select(0, sites.image)
        else:
            rows = value.expand(self.selection.batch, -1, *self.grid).permute(0, 2, 3, 1).flatten(0, 2)
            rows = rows if full else rows.index_select(0, sites.index)
        value = as_value(rows)
        return value if len(channels) == 1 else value.unflatten(1, channels) if channels else value[:, 0]

    def packed(self, cells: Tensor) -> Tensor:
        if cells.dim() < 5:
            return super().packed(cells)
        return as_value(cells.movedim((0, -2, -1), (0, 1, 2)).reshape(-1, prod(cells.shape[1:-2])))

    def whole(self) -> Tensor:
        return self.rows.view(self.selection.batch, *self.grid, -1).permute(0, 3, 1, 2)

    def _spread(self) -> Tensor | None:
        if not self.selection.queues or self.full or self.has_value or not self.form.plain:
            return None
        rows, (height, width) = self.computed(), self.grid
        if indirect.unsupported(rows, 1) is not None:
            return None
        batch, channels = self.selection.batch, rows.shape[1]
        table, inputs = self.selection.spread(self.grid), rows.shape[0]
        out = workspace.empty(table.shape[0], channels, rows)
        indirect.pooling("sum", channels, rows.dtype, 0.0).job(rows, None, table, inputs, out, self.fill).wait()
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _masked(self) -> Tensor:
        return self._filled(self._value.new_zeros(()))

    def _filled(self, fill: Tensor) -> Tensor:
        rows = as_rows(self.restricted())
        batch, (height, width) = self.selection.batch, self.grid
        dense = fill.to(rows).expand(batch * height * width, rows.shape[1]).clone(memory_format=torch.contiguous_format)
        dense.index_copy_(0, self.selection.sites(self.grid).index, rows)
        return dense.view(batch, height, width, -1).permute(0, 3, 1, 2)


def as_value(rows: Tensor) -> Tensor:
    """Rows (n, C) as (1, C, n, 1), a channels-last view: no copy.

    In the strides of the sides of length 1 too: PyTorch's batch norm on CPU takes `rows.T[None, :, :, None]` for
    contiguous and its gradient for channels-last, and the result is wrong without an error.
    """
    return rows[None, :, None].permute(0, 3, 1, 2)


def as_rows(value: Tensor) -> Tensor:
    """A value as rows (n, C), in `MaskedFeatures` one for each pixel: no copy of a channels-last one."""
    return value.permute(0, 2, 3, 1).flatten(0, 2)


def enter(dense: Tensor, selection: Selection) -> Features:
    """Full guided features of an ordinary map (N, C, H, W): no copy where it is channels-last."""
    grid = (dense.shape[2], dense.shape[3])
    if selection.dense_storage:
        return MaskedFeatures.make(dense, selection, grid, full=True)
    rows = dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1])
    return SparseFeatures.of_rows(rows, selection, grid, full=True)


def ordinary(features: Tensor) -> Tensor:
    """What a frozen network computes without a mask, as the ordinary map that it is, in channels-last memory."""
    return features.form.present(features.value) if isinstance(features, UnguidedFeatures) else features


def _memory_of(tensor: Tensor) -> int:
    """What tensors that are views of one another have in common, also where a tracer watches and no memory is."""
    storage: Any = tensor.untyped_storage()
    return int(storage._cdata)


def _requires_grad(features: Features) -> bool:
    """Whether the wrapper itself, not its value, is in the autograd graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return features.requires_grad


def _met(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a function that met guided features and unguided ones, which become ordinary maps: the first
    argument one that may be written to."""
    first = args[0] if args else None

    def presented(part: UnguidedFeatures) -> Tensor:
        return part.form.present(part.writable() if part is first else part.value)

    return tree_map_only(UnguidedFeatures, presented, (args, kwargs))


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
        if not isinstance(args[0], Features) or not args[0].selection.everything or not args[0].form.plain:
            raise RuntimeError(in_place_message(name))
        written, args = args[0], (args[0].writable(), *args[1:])  # an ordinary map, in the features' own memory
        written._memory.written()
        leaving = leaving[1:]
        if not leaving:
            return func(*args, **kwargs)
    selection, grid = leaving[0].selection, leaving[0].grid
    if selection.options.strict:
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
            return depart(func, leaving[0], view)
    # Contiguous, as the wrappers' own strides say: `x.view(len(x), -1)` would refuse the rows' order.
    dense = {key: tensor.contiguous() for key, tensor in dense.items()}
    given = dense
    if selection.followed:  # of no size that left before, for what leaves does not take up its sites at once
        given = {key: Departed.of(tensor, selection, frozenset()) for key, tensor in dense.items()}
    if nested:
        args, kwargs = tree_map_only(Features, lambda features: given[id(features)], (args, kwargs))
    else:
        args = tuple(given.get(id(argument), argument) for argument in args)
        kwargs = {name: given.get(id(argument), argument) for name, argument in kwargs.items()}
    result = func(*args, **kwargs)
    for features in leaving:
        _lend(features, dense[id(features)], result)
    return depart(func, leaving[0], result)


def _lend(features: Features, dense: Tensor, result: Any) -> None:
    """Remember a view of the features that went out, so that a later write to it is noticed, not lost.

    Inference tensors have no version counter; there the write goes unnoticed by PyTorch itself too.
    """
    if dense.is_inference():
        return
    memory = _memory_of(dense)
    results = [result] if isinstance(result, Tensor) else tree_leaves(result)
    if any(isinstance(leaf, Tensor) and _memory_of(leaf) == memory for leaf in results):
        features._lent.append((dense, dense._version))


def _writes_to_features(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("out") is not None and any(isinstance(leaf, Features) for leaf in tree_leaves(kwargs["out"])):
        return True
    return bool(args) and isinstance(args[0], Features) and is_in_place(func, args, kwargs)


def in_place_message(name: str) -> str:
    return (
        f"{name} would write in place into guided features, and sparsenet has no rule for it: the write would be "
        "lost. Use the out-of-place operation, or embed at a later stage"
    )


class Departed(torch.Tensor):
    """An ordinary tensor that came of guided features which left the region: it remembers the selection and the sizes
    they had, through whatever is computed with it. Under `selectify(reenter=True)`, so that a convolution that meets a
    map of the same grid can take its sites up again, and in the dry run, so that the plan can tell what comes of the
    stage from what only runs later. Elsewhere nothing is known of such a tensor but numbers.
    """

    selection: Selection
    grids: frozenset[Pair]

    @staticmethod
    def of(tensor: Tensor, selection: Selection, grids: frozenset[Pair]) -> Departed:
        departed = tensor.as_subclass(Departed)
        departed.selection, departed.grids = selection, grids
        return departed

    def ordinary(self) -> Tensor:
        return self.as_subclass(torch.Tensor)

    def reentered(self) -> Tensor:
        """Guided features with every pixel's context, if this is a map (N, C, H, W) of a size that left, or itself."""
        grid = (self.shape[2], self.shape[3]) if self.dim() == 4 else None
        if not self.selection.options.reenter or grid not in self.grids:
            return self
        if len(self) != self.selection.batch or not self.is_floating_point():
            return self
        self.selection.report(Operation("reenter", "reentry", grid))
        return enter(self.ordinary(), self.selection)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, Features) for kind in types):
            return NotImplemented
        if func in (F.conv2d, torch.conv2d):
            input = args[0] if args else kwargs["input"]
            features = input.reentered() if isinstance(input, Departed) else input
            if isinstance(features, Features):
                return func(features, *args[1:], **kwargs) if args else func(**kwargs | {"input": features})
        departed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Departed)]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            known = [leaf for leaf in departed if hasattr(leaf, "grids")]
            turned = any(_is_turned(leaf, result) for leaf in known)
        if not known:
            return tree_map_only(Departed, Departed.ordinary, result)
        lost = turned or func in _MOVING or any(leaf.selection is not known[0].selection for leaf in known)
        grids = frozenset() if lost else frozenset().union(*(leaf.grids for leaf in known))
        return tree_map_only(Tensor, lambda tensor: Departed.of(tensor, known[0].selection, grids), result)


# Behind these a pixel is elsewhere, so that its site says nothing of it.
_MOVING = {getattr(place, name) for place in (torch, Tensor) for name in ["flip", "roll", "rot90", "fliplr", "flipud"]}


def _is_turned(departed: Departed, view: Any) -> bool:
    """Whether lines have become columns by a transposition or permutation. Of a square map the shape does not tell, but
    the strides of the view do."""
    if not isinstance(view, Tensor) or view.shape != departed.shape or view.layout is not torch.strided:
        return False
    before, after = departed.stride(), view.stride()
    first, *others = [dim for dim, (old, new) in enumerate(zip(before, after, strict=True)) if old != new] or [0]
    return (
        others == [first + 1]
        and (before[first], before[first + 1]) == (after[first + 1], after[first])
        and tuple(view.shape[first : first + 2]) in departed.grids
        and _memory_of(view) == _memory_of(departed)
        and view.storage_offset() == departed.storage_offset()
    )


def depart(func: Any, features: Features, result: Any) -> Any:
    """What an exit or a reduction gives: ordinary tensors, which remember where they came from if that is asked for."""
    selection, order = features.selection, features.form.order
    if not selection.followed:
        return result
    grids = frozenset() if func in _MOVING or order.index("H") > order.index("W") else frozenset({features.grid})
    return tree_map_only(Tensor, lambda tensor: Departed.of(tensor, selection, grids), result)


# -- autograd between a wrapper and its value ------------------------------------------------------------------


def _value_gradient(
    grad: Tensor, features_type: type[Features], selection: Selection, grid: Pair, full: bool, form: Form
) -> Tensor:
    """The gradient of a value from the gradient of its wrapper, which has the wrapper's shape."""
    if isinstance(grad, Features):  # from a custom Function that computes with what it has saved
        grad = grad.form.present(grad.whole()) if grad.full else grad.dense("backward")
    if not form.plain:
        with torch.enable_grad():  # a form is linear, and this is its adjoint
            dense = grad.new_zeros(selection.batch, prod(form.channels), *grid).requires_grad_()
            (grad,) = torch.autograd.grad(form.present(dense), dense, grad)
    if features_type is SparseFeatures:
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
        return as_value(rows if full else rows.index_select(0, selection.sites(grid).index))
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
        form: Form,
    ) -> Features:
        features = cls._wrap(value, selection, grid, full, fill, live, form)
        features._tied = tie is not None
        ctx.place = (cls, selection, grid, full, form)
        ctx.passage = features.passage
        return features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _arriving(ctx, grad), None, None, None, None, None, None, None, None


class _Rebase(torch.autograd.Function):
    """wrapper, its new value -> the same wrapper, after an in-place operation."""

    @staticmethod
    def forward(ctx: Any, features: Features, value: Tensor) -> Features:
        ctx.mark_dirty(features)
        ctx.place = (type(features), features.selection, features.grid, features.full, features.form)
        ctx.passage = features.passage
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
    return _value_gradient(grad, *ctx.place)


class _Leave(torch.autograd.Function):
    """wrapper -> value, where only the wrapper is in the graph: the output of a custom Function or a checkpoint."""

    @staticmethod
    def forward(ctx: Any, features: Features) -> Tensor:
        ctx.place = (type(features), features.selection, features.grid, features.full, features.form)
        return features._value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        features_type, selection, grid, full, form = ctx.place
        if features_type is SparseFeatures:
            rows = as_rows(grad)
            sites = selection.everywhere(grid) if full else selection.sites(grid)
            dense = rows.new_zeros(selection.batch * grid[0] * grid[1], rows.shape[1]).index_copy(0, sites.index, rows)
            grad = dense.view(selection.batch, *grid, -1).permute(0, 3, 1, 2)
        if form.padding is not None:  # around the map nothing is asked for, so that its adjoint gives `grad` back
            form = replace(form, padding=replace(form.padding, mode="zeros", value=0.0))
        return form.present(grad)
