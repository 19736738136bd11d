"""Operations on several maps of one size: arithmetic and concatenation over channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsenet.backends import indirect
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads
from sparsenet.calls import is_in_place
from sparsenet.features import Features, Leaves, as_rows, rule
from sparsenet.work import Gate, Work

_ARITHMETIC = """
    add sub mul div true_divide subtract multiply divide maximum minimum rsub pow fmax fmin remainder fmod floor_divide
    atan2 hypot copysign addcmul addcdiv lerp where masked_fill clamp clip clamp_min clamp_max xlogy logaddexp
    eq ne lt le gt ge not_equal less less_equal greater greater_equal logical_and logical_or logical_xor
    bitwise_and bitwise_or bitwise_xor
"""
_OPERATORS = """
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow mod imod floordiv rfloordiv
    eq ne lt le gt ge and rand iand or ror ior xor rxor ixor
"""


def _functions() -> list[Any]:
    spelled = [name + ending for name in _ARITHMETIC.split() for ending in ("", "_")]
    operators = [f"__{name}__" for name in _OPERATORS.split()]
    return [getattr(torch, name) for name in spelled if hasattr(torch, name)] + [
        getattr(Tensor, name) for name in spelled + operators if hasattr(Tensor, name)
    ]


_ADDING = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_SCALING = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}


def common(parts: list[Any]) -> tuple[Features, bool]:
    """A feature map that speaks for all of `parts`, and whether their combination is full.

    Raises:
        Leaves: when two belong to different selections, sizes or forms, or a tensor is larger than the map.
    """
    guided = [part for part in parts if isinstance(part, Features)]
    first = guided[0]
    for part in guided:
        if part.form.padding is not None:
            raise Leaves(part.form.description)
        if part.selection is not first.selection:
            raise Leaves("meets features of another selection")
        if part.grid != first.grid:
            raise Leaves(f"meets features of another size, {part.grid[0]}x{part.grid[1]}")
        if part.form.order != first.form.order:
            raise Leaves(f"meets features laid out otherwise, {first.form.order} and {part.form.order}")
    order = first.form.order
    lengths = {"N": first.selection.batch, "H": first.grid[0], "W": first.grid[1]}
    for part in parts:
        if isinstance(part, Tensor) and not isinstance(part, Features):
            if part.dim() > len(order):
                raise Leaves("meets a tensor of more dimensions")
            for letter, length in zip(order[len(order) - part.dim() :], part.shape, strict=True):
                if letter != "C" and length not in (1, lengths[letter]):
                    raise Leaves(f"meets a tensor of another {'batch size' if letter == 'N' else 'size'}")
    return first, all(part.full for part in guided)


def aligned(parts: list[Any]) -> tuple[Features, bool, list[Any]]:
    """As `common`, with every part's cells as they combine: full ones restricted where one is not full."""
    first, full = common(parts)
    cells = []
    for part in parts:
        if isinstance(part, Features):
            cells.append(part.cells(part.value if full else part.restricted()))
        elif isinstance(part, Tensor):
            cells.append(first.operand(part, full))
        else:
            cells.append(part)
    return first, full, cells


def made(first: Features, cells: Tensor, full: bool, parts: list[Any]) -> Features:
    """Features of cells that were combined of `parts`."""
    live = any(part._live for part in parts if isinstance(part, Features))
    form = first.form.with_channels(cells.shape[1:-2])
    return type(first).make(first.packed(cells), first.selection, first.grid, full=full, live=live, form=form)


@rule(*_functions(), any_form=True)
def arithmetic(func: Any, *args: Any, **kwargs: Any) -> Features:
    """Operations on each pixel's numbers by themselves, of one to three maps, tensors and numbers."""
    if kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    tensors = [*args, *kwargs.values()]
    in_place = is_in_place(func, args, kwargs)
    if in_place and not isinstance(tensors[0], Features):
        raise Leaves("writes into an ordinary tensor")
    if func is torch.where and len(tensors) == 1:
        raise Leaves("gives the places of pixels")
    following = _continued(func, args, in_place) if len(args) == 2 and not kwargs else None
    if following is not None:
        return following
    first, full, cells = aligned(tensors)
    if in_place:
        first.writable()
        own = first.value if full else first.restricted()
        own = own if own is first._value else own.clone()  # neither a view nor rows that others hold
        cells[0] = first.cells(own)
    count = len(args)
    result = func(*cells[:count], **dict(zip(kwargs, cells[count:], strict=True)))
    if result is NotImplemented:
        return result
    return first.replace(own, full) if in_place else made(first, result, full, tensors)


def _continued(func: Any, parts: tuple[Any, ...], in_place: bool) -> Features | None:
    """A sum with what a layer has yet to compute, or its product with a number for each channel, as part of the
    layer's work, if it can be."""
    if func not in _ADDING and func not in _SCALING:
        return None
    for layer, other in (parts, parts[::-1]):
        if not isinstance(layer, Features) or not isinstance(other, Tensor) or other is layer:
            continue
        if layer._work is None:
            if func in _SCALING and not in_place and (product := _gated(layer, other)) is not None:
                return product
            continue
        into = parts[0] if in_place else None
        if into is not None and into.selection is not layer.selection:
            continue
        if func in _ADDING:
            following = _with_residual(layer, other, into)
        else:
            following = None if isinstance(other, Features) else _with_scale(layer, other, into)
        if following is not None:
            return following
    return None


def _with_residual(layer: Features, other: Tensor, into: Features | None) -> Features | None:
    if not isinstance(other, Features) or (other.form, other.grid) != (layer.form, layer.grid):
        return None
    if other.selection is not layer.selection or other.dtype != layer.dtype:
        return None
    if layer.full and not other.full:
        return None
    rows = other.computed() if layer.full or not other.full else as_rows(other.restricted())
    work = layer._work
    if work is None:
        return None
    following = layer.then(work.epilogue.plus(rows.contiguous()), into)  # as the kernels read it
    if following is not None and following._work is not None:
        if other is into:
            following._work.read_from.append(other._readers)
        else:
            other.read_by(following._work)
    return following


def _with_scale(layer: Features, other: Tensor, into: Features | None) -> Features | None:
    cells, work = _by_channel(layer, other), layer._work
    if cells is None or work is None:
        return None
    return layer.then(work.layer.scaled(work.epilogue, other, cells), into)


def _gated(x: Features, other: Tensor) -> Features | None:
    """The product of what a frozen layer gave with a number for each channel, as work: see `Gate`."""
    rows = x._rows
    if rows is None or isinstance(other, Features) or x.selection.observers:
        return None
    cells = _by_channel(x, other)
    if cells is None or indirect.unsupported(rows, 1) is not None:
        return None
    x._check_writes()
    return gated(x, rows, cells.reshape(-1).clone())  # which may be written to before it is read


def gated(x: Features, rows: Tensor, gate: Tensor) -> Features:
    """The product of features that have rows with a number for each channel, (C,), as work: see `Gate`."""
    selection = x.selection
    reads = Reads(rows, None, len(rows), len(rows), 1, x.grid, x.grid, selection.everything, gate)
    work = Work(Gate(rows.shape[1]), selection, reads, Epilogue())
    x.read_by(work)
    return type(x).deferred(work, selection, x.grid, full=x.full, fill=None, form=x.form)


def _by_channel(x: Features, other: Tensor) -> Tensor | None:
    """The cells of a tensor that has a number for each channel, the same in all images."""
    form = x.form
    if len(form.channels) != 1 or other.numel() != form.channels[0] or other.dim() > len(form.order):
        return None
    cells = form.cells(other[(None,) * (len(form.order) - other.dim())])
    if cells.shape[1] != form.channels[0] or other.dtype != x.dtype or other.requires_grad:
        return None
    return cells


@rule(torch.cat, torch.concat, torch.concatenate, any_form=True)
def cat(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Features:
    dim = kwargs.pop("axis", dim)
    if kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    tensors = list(tensors)
    first, _ = common(tensors)
    form = first.form
    if any(part.dim() != first.dim() for part in tensors) or form.letters([dim]) != "C":
        raise Leaves("concatenates over another dimension than channels")
    others = [each for each, letter in enumerate(form.order) if letter != "C"]
    if any(part.shape[each] != first.shape[each] for part in tensors for each in others):
        raise Leaves("concatenates maps of different sizes")
    _, full, cells = aligned(tensors)
    return made(first, func(cells, dim=form.cell_dim(dim)), full, tensors)
