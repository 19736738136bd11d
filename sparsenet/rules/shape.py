"""What moves dimensions and channels but no pixel: views, permutations, slices, splits; and padding and cropping."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, rule
from sparsenet.form import Form, Padding
from sparsenet.rules.combine import aligned
from sparsenet.sites import Pair, Window

_Tensor: Any = Tensor


def sizes(arguments: Sequence[Any]) -> list[int]:
    """Numbers given one by one or as one sequence."""
    first = arguments[0] if len(arguments) == 1 else arguments
    return [int(number) for number in (first if isinstance(first, Sequence | torch.Size) else [first])]


# -- permutations ------------------------------------------------------------------------------------------------


def permuted(x: Features, dims: Sequence[int]) -> Features:
    if x.form.padding is not None:
        raise Leaves(x.form.description)
    count = x.dim()
    if not all(-count <= dim < count for dim in dims) or sorted(dim % count for dim in dims) != list(range(count)):
        raise Leaves("names its dimensions wrongly")  # and PyTorch says so
    form, moved = x.form.permuted(dims)
    if moved == sorted(moved):
        return x.in_form(form, x.fill)
    cells, places = x.cells(x.value), [1 + place for place in moved]
    fill = None if x.fill is None else x.fill.view(x.form.channels).permute(moved).flatten()
    return x.as_view(x.packed(cells.permute(0, *places, -2, -1)), form, fill)


@rule(Tensor.permute, torch.permute, any_form=True)
def permute(func: Any, input: Features, *dims: Any, **kwargs: Any) -> Features:
    return permuted(input, sizes(dims or (kwargs["dims"],)))


@rule(
    Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims, any_form=True,
)  # fmt: skip
def transpose(func: Any, input: Features, dim0: int, dim1: int) -> Features:
    dims = list(range(input.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permuted(input, dims)


@rule(Tensor.movedim, torch.movedim, Tensor.moveaxis, torch.moveaxis, any_form=True)
def movedim(func: Any, input: Features, source: Any, destination: Any) -> Features:
    places = func(torch.empty(tuple(range(input.dim())), device="meta"), source, destination).shape
    return permuted(input, list(places))


# -- views -------------------------------------------------------------------------------------------------------


def viewed(x: Features, shape: Sequence[int]) -> Features:
    numbers = list(shape)
    if numbers.count(-1) == 1:
        rest = prod(number for number in numbers if number != -1)
        numbers[numbers.index(-1)] = x.numel() // rest if rest else 0
    form = x.form.viewed(numbers, x.selection.batch, x.grid)
    if form is None or prod(numbers) != x.numel():
        raise Leaves("merges or splits pixels")
    return x.as_view(x.value, form, x.fill)


@rule(Tensor.view, Tensor.reshape, torch.reshape, any_form=True)
def view(func: Any, input: Features, *shape: Any, **kwargs: Any) -> Features:
    if isinstance(shape[0] if shape else None, torch.dtype) or "dtype" in kwargs:
        raise Leaves("reads the numbers as another dtype")
    return viewed(input, sizes(shape or (kwargs["shape"],)))


@rule(Tensor.view_as, Tensor.reshape_as, any_form=True)
def view_as(func: Any, input: Any, other: Any) -> Tensor:
    """Of an ordinary tensor, where only the shape is a guided map's, too."""
    return viewed(input, other.shape) if isinstance(input, Features) else input.reshape(other.shape)


@rule(Tensor.flatten, torch.flatten, any_form=True)
def flatten(func: Any, input: Features, start_dim: int = 0, end_dim: int = -1) -> Features:
    shape = list(input.shape)
    first, last = start_dim % len(shape), end_dim % len(shape)
    return viewed(input, [*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]])


@rule(Tensor.unflatten, torch.unflatten, any_form=True)
def unflatten(func: Any, input: Features, dim: int, sizes: Any) -> Features:
    shape, lengths = list(input.shape), list(sizes)
    if -1 in lengths:
        lengths[lengths.index(-1)] = shape[dim] // max(1, -prod(lengths))
    first = dim % len(shape)
    return viewed(input, [*shape[:first], *lengths, *shape[first + 1 :]])


@rule(Tensor.unsqueeze, torch.unsqueeze, any_form=True)
def unsqueeze(func: Any, input: Features, dim: int) -> Features:
    if input.form.padding is not None:
        raise Leaves(input.form.description)
    return input.as_view(input.value, input.form.unsqueezed(dim), input.fill)


@rule(Tensor.squeeze, torch.squeeze, any_form=True)
def squeeze(func: Any, input: Features, dim: Any = None) -> Features:
    shape, padded = input.shape, input.form.padding is not None
    asked = range(len(shape)) if dim is None else sizes([dim])
    dims = [each % len(shape) for each in asked if shape[each] == 1]
    if padded or set(input.form.letters(dims)) - {"C"}:
        raise Leaves("merges images or pixels")
    return input.as_view(input.value, input.form.without(dims), input.fill)


@rule(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to, Tensor.expand_as, any_form=True)
def expand(func: Any, input: Any, *shape: Any, **kwargs: Any) -> Tensor:
    if func is Tensor.expand_as:
        shape = (shape[0].shape,)
    if not isinstance(input, Features):
        return input.expand(*shape)
    numbers, form = sizes(shape or (kwargs["size"],)), input.form
    own = tuple(length if number == -1 else number for number, length in zip(numbers, input.shape, strict=False))
    others = [dim for dim, letter in enumerate(form.order) if letter != "C"]
    if len(numbers) != input.dim() or form.padding or any(own[dim] != input.shape[dim] for dim in others):
        raise Leaves("repeats images or pixels")
    channels = [own[dim] for dim, letter in enumerate(form.order) if letter == "C"]
    cells = input.cells(input.value)
    return input.as_view(input.packed(cells.expand(-1, *channels, -1, -1)), form.with_channels(channels))


@rule(torch.channel_shuffle, F.channel_shuffle, torch.native_channel_shuffle)
def channel_shuffle(func: Any, input: Features, groups: int) -> Features:
    apart = input.value.unflatten(1, (groups, -1))
    return input.like(input.packed(apart.transpose(1, 2)))


# -- parts of the channels, and of the map -------------------------------------------------------------------------


@rule(Tensor.__getitem__, any_form=True)
def getitem(func: Any, input: Any, index: Any) -> Features:
    if not isinstance(input, Features):
        raise Leaves("is an index")
    features, added = _selected(input, index)
    for dim in added:
        features = features.as_view(features._value, features.form.unsqueezed(dim), features.fill)
    return features


def _selected(x: Features, index: Any) -> tuple[Features, list[int]]:
    """The part of a map that an index takes, and where it adds dimensions of length 1."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is ... or isinstance(part, int | slice | list) for part in parts):
        raise Leaves("takes pixels by a tensor")
    if any(isinstance(part, bool) for part in parts):
        raise Leaves("takes all or nothing by a truth value")
    named = sum(part is not None and part is not ... for part in parts)
    if named > x.dim() or parts.count(...) > 1 or x.form.padding is not None:
        raise Leaves("takes dimensions that are not there, or pixels of padding")
    rest = [slice(None)] * (x.dim() - named)
    at = parts.index(...) if ... in parts else len(parts)
    parts = [*parts[:at], *rest, *parts[at + 1 :]]
    by_dim = [part for part in parts if part is not None]
    added, kept = [], 0
    for part in parts:
        if part is None:
            added.append(kept)
        kept += not isinstance(part, int) or part is None
    channel: list[Any] = []
    space: dict[str, slice] = {}
    for dim, part in enumerate(by_dim):
        letter = x.form.order[dim]
        if letter == "C":
            channel.append(part)
        elif not isinstance(part, slice):
            raise Leaves("takes one image or one line of pixels")
        elif part.indices(x.shape[dim]) != (0, x.shape[dim], 1):
            if letter == "N":
                raise Leaves("takes some of the images")
            space[letter] = part
    lists = [part for part in channel if isinstance(part, list)]
    if lists and (len(lists) > 1 or any(isinstance(part, int) for part in channel)):
        raise Leaves("takes channels by a list and another number")  # which may put them in front
    if not all(isinstance(number, int) for part in lists for number in part):
        raise Leaves("takes channels by nested lists")
    features = x
    if any(part != slice(None) for part in channel):
        cells = x.cells(x.value)[(slice(None), *channel)]
        lengths = list(cells.shape[1:-2])
        dims = [dim for dim, part in enumerate(by_dim) if isinstance(part, int)]
        form = x.form.without(dims).with_channels(lengths)
        features = x.like(x.packed(cells), form=form) if lists else x.as_view(x.packed(cells), form)
    elif not space:
        features = x.as_view(x.value, x.form, x.fill)
    return (_cropped(features, space) if space else features), added


def _cropped(x: Features, space: dict[str, slice]) -> Features:
    """Some lines and columns, evenly spaced: what a convolution with a single tap reads."""
    window, out_grid = [], []
    for letter, length in zip("HW", x.grid, strict=True):
        start, stop, step = space.get(letter, slice(None)).indices(length)
        window.append((start, step))
        out_grid.append(len(range(start, stop, step)))
    if min(out_grid) == 0:
        raise Leaves("takes no pixel")
    (top, down), (left, right) = window
    return x.viewed_by(moved(x, Window((1, 1), (down, right), (-top, -left)), (out_grid[0], out_grid[1])))


def moved(x: Features, window: Window, out_grid: Pair) -> Features:
    """The map of another size whose every pixel is one of these pixels, or zero: by a window of one tap."""
    if isinstance(x, MaskedFeatures):
        read = x.read("a crop")
        top, left = (-pad for pad in window.padding)
        value = read[:, :, top :: window.stride[0], left :: window.stride[1]][:, :, : out_grid[0], : out_grid[1]]
        return MaskedFeatures.make(value.clone(), x.selection, out_grid, full=False, form=x.form)
    assert isinstance(x, SparseFeatures)
    kernel_map = x.selection.kernel_map(x.grid, x.full, window, out_grid)
    rows = x.surrounded().index_select(0, kernel_map.table.view(-1))
    return SparseFeatures.of_rows(rows, x.selection, out_grid, form=x.form)


@rule(Tensor.__setitem__, any_form=True)
def setitem(func: Any, input: Any, index: Any, value: Any) -> None:
    """Writes to channels; what is written elsewhere raises."""
    if not isinstance(input, Features):
        raise Leaves("writes into an ordinary tensor")
    part, added = _selected(input, index)
    if added or part.grid != input.grid or part._memory is not input._memory:
        raise Leaves("writes to some of the pixels")
    _, full, (into, given) = aligned([part, value])
    if full != input.full:
        input.replace(input.restricted().clone(), full)
        return setitem(func, input, index, value)
    input.writable()
    into[:] = given
    input.replace(input._value, full)
    return None


def _pieces(function: Any, x: Features, dim: int, *arguments: Any) -> tuple[Features, ...]:
    """What a function that cuts a tensor along a dimension makes of the channels."""
    if x.form.padding is not None or x.form.letters([dim]) != "C":
        raise Leaves("cuts the batch or the map, not channels")
    cell_dim = x.form.cell_dim(dim)
    form, place = x.form, x.form.channel(dim)
    found = []
    for cells in function(x.cells(x.value), *arguments, dim=cell_dim):
        channels = list(form.channels)
        channels[place] = cells.shape[cell_dim]
        found.append(x.as_view(x.packed(cells), form.with_channels(channels)))
    return tuple(found)


@rule(
    torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.tensor_split, Tensor.tensor_split,
    torch.split_with_sizes, Tensor.split_with_sizes, torch.functional.split, any_form=True,
)  # fmt: skip
def cut(func: Any, input: Any = None, *args: Any, **kwargs: Any) -> tuple[Features, ...]:
    input = kwargs.pop("tensor", input)
    dim = kwargs.pop("dim", 0)
    how, *more = [*args, *kwargs.values()]
    return _pieces(func, input, more[0] if more else dim, how)


@rule(torch.unbind, Tensor.unbind, any_form=True)
def unbind(func: Any, input: Features, dim: int = 0) -> tuple[Features, ...]:
    pieces = _pieces(lambda cells, dim: cells.split(1, dim), input, dim)
    return tuple(piece.as_view(piece._value, piece.form.without([dim])) for piece in pieces)


@rule(torch.narrow, Tensor.narrow, any_form=True)
def narrow(func: Any, input: Features, dim: int, start: int, length: int) -> Features:
    size = input.shape[dim]
    first = start + size if start < 0 else start
    if not 0 <= first <= first + length <= size:
        raise Leaves("takes numbers that are not there")  # and PyTorch says so
    return getitem(Tensor.__getitem__, input, (slice(None),) * (dim % input.dim()) + (slice(first, first + length),))


@rule(torch.select, Tensor.select, any_form=True)
def select(func: Any, input: Features, dim: int, index: int) -> Features:
    return getitem(Tensor.__getitem__, input, (slice(None),) * (dim % input.dim()) + (index,))


@rule(torch.index_select, Tensor.index_select, any_form=True)
def index_select(func: Any, input: Any, dim: int, index: Tensor) -> Features:
    if not isinstance(input, Features) or isinstance(index, Features):
        raise Leaves("takes pixels by a tensor")
    (piece,) = _pieces(lambda cells, dim: [cells.index_select(dim, index)], input, dim)
    return input.like(piece._value.clone(), form=piece.form)


@rule(torch.stack, any_form=True)
def stack(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Features:
    if kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    first = next(part for part in tensors if isinstance(part, Features))
    dim %= first.dim() + 1
    if not first.form.order[:dim] or dim > first.dim():
        raise Leaves("stacks images")
    result: Features = torch.cat([part.unsqueeze(dim) for part in tensors], dim)  # type: ignore[assignment]
    return result


# -- padding -----------------------------------------------------------------------------------------------------

_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@rule(F.pad, any_form=True)
def pad(func: Any, input: Features, pad: Any, mode: str = "constant", value: float | None = None) -> Features:
    """Around the map it is kept for what reads next; around the channels it is done."""
    x, around, number = input, list(pad), 0.0 if value is None else float(value)
    if x.form.order != "NCHW" or len(around) % 2 or len(around) > 6 or mode not in _MODES:
        raise Leaves(f"pads a map laid out as {x.form.order}, or its batch")
    func(torch.empty(x.shape, device="meta"), around, mode, value)  # raises where PyTorch does
    around += [0] * (6 - len(around))
    if any(around[4:]):
        if x.form.padding is not None or mode != "constant":
            raise Leaves("pads channels in another way")
        x = x.like(func(x.value, (0, 0, 0, 0, *around[4:]), mode, value))
    else:
        x = x.sibling(x.form)
    left, right, top, bottom = around[:4]
    if not any(around[:4]):
        return x
    padding = Padding(top, bottom, left, right, _MODES[mode], number if mode == "constant" else 0.0)
    if padding.crops and mode != "constant":
        raise Leaves("crops by another padding")
    joined = padding if x.form.padding is None else x.form.padding.then(padding)
    if joined is None:
        raise Leaves("pads a padded map in another way")
    return x.sibling(Form("NCHW", x.form.channels, joined))
