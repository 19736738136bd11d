"""Convolution over active sites, transposed convolution among it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet import backends
from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, as_rows, rule
from sparsenet.form import Form, Padding
from sparsenet.selection import Operation
from sparsenet.sites import Pair, TransposedWindow, Window


def pair(value: Any) -> Pair:
    """PyTorch's int-or-tuple arguments as (vertical, horizontal)."""
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return int(first), int(rest[0] if rest else first)


Pads = tuple[Pair, Pair]  # ((top, bottom), (left, right))


class Geometry(NamedTuple):
    """Where a convolution reads: its window, and the size of its output."""

    window: Window
    out_grid: Pair


@rule(F.conv2d, torch.conv2d, any_form=True)
def conv2d(
    func: Any,
    input: Features,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Features:
    if not isinstance(input, Features) or isinstance(weight, Features) or isinstance(bias, Features):
        raise Leaves("its weight is a feature map")
    return masked_conv2d(input, weight, bias, stride, padding, dilation, groups)


def masked_conv2d(
    x: Features,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    backend: str = "auto",
    fill: Tensor | None = None,
    live: bool | None = None,
) -> Features:
    """`torch.nn.functional.conv2d` of guided features: computed at the active sites of the output's size only.

    Equals the dense convolution of the input, zero at its inactive pixels (full features: read whole), kept at
    the output's active pixels. SCN (arXiv 2002.01205), section 3: im2col, select rows, matrix product.

    Args:
        x: (N, C, H, W), padded or not.
        weight: (O, C / groups, kh, kw); the other arguments are those of `torch.nn.Conv2d`.
        backend: the layer's own choice; `use_backend` goes before it, the selection's comes after.
        fill: what the result holds at inactive pixels when it leaves the region, (O,).
        live: whether reading the result gives the mask gradient: see `Features.make`.

    Raises:
        Leaves: for another form, and for padding that two sides disagree about.
    """
    kernel = pair(weight.shape[2:])
    geometry, pads, padding_mode = geometry_of(x.form, x.grid, kernel, stride, padding, dilation, padding_mode)
    dilation = geometry.window.dilation

    def dense(read: Tensor) -> Tensor:
        (top, bottom), (left, right) = pads
        padding = (top, left)
        if padding_mode != "zeros" or (bottom, right) != padding or min(padding) < 0:
            read, padding = Padding(top, bottom, left, right, padding_mode).apply(read), (0, 0)
        return F.conv2d(read, weight, bias, geometry.window.stride, padding, dilation, groups)

    per_site = weight.shape[1] * geometry.window.taps * weight.shape[0]
    return _convolution("conv2d", x, weight, bias, groups, geometry, dense, per_site, backend, fill, live)


def geometry_of(
    form: Form, grid: Pair, kernel: Pair, stride: Any, padding: Any, dilation: Any, padding_mode: str
) -> tuple[Geometry, Pads, str]:
    """Where a convolution of a map of a form and a grid, padded or not, reads it, with the padding and its mode in one.

    Raises:
        Leaves: for another form, and for padding that two sides disagree about.
    """
    if form.order != "NCHW":
        raise Leaves(form.description)
    dilation = pair(dilation)
    pads = _pads(padding if isinstance(padding, str) else pair(padding), kernel, dilation)
    if form.padding is not None:
        pads, padding_mode = _joined(form.padding, pads, padding_mode)
    return _geometry(grid, kernel, pair(stride), pads, dilation, padding_mode), pads, padding_mode


@rule(F.conv_transpose2d, torch.conv_transpose2d)
def conv_transpose2d(
    func: Any,
    input: Features,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Features:
    """Computed at the active sites of the finer size: a convolution whose taps find an input pixel or none."""
    x = input
    if not isinstance(input, Features) or isinstance(weight, Features) or isinstance(bias, Features):
        raise Leaves("its weight is a feature map")
    inputs, outputs, *kernel = weight.shape
    steps, pads, more, spread = pair(stride), pair(padding), pair(output_padding), pair(dilation)
    window = TransposedWindow(pair(kernel), steps, pads, spread)
    height, width = (
        (size - 1) * by - 2 * pad + step * (taps - 1) + extra + 1
        for size, by, pad, step, taps, extra in zip(x.grid, steps, pads, spread, kernel, more, strict=True)
    )
    if height < 1 or width < 1:
        raise RuntimeError(f"the transposed convolution of a map {x.grid} would be of size {height}x{width}")
    if any(extra >= max(by, step) for extra, by, step in zip(more, steps, spread, strict=True)):
        raise RuntimeError("output padding must be smaller than either stride or dilation")

    def dense(read: Tensor) -> Tensor:
        return F.conv_transpose2d(read, weight, bias, stride, padding, output_padding, groups, dilation)

    apart = weight.view(groups, inputs // groups, outputs, *kernel)
    swapped = apart.transpose(1, 2).reshape(groups * outputs, inputs // groups, *kernel)
    per_site = weight.numel() / (steps[0] * steps[1])  # so many taps, on average, meet an input pixel
    geometry = Geometry(window, (height, width))
    return _convolution("conv_transpose2d", x, swapped, bias, groups, geometry, dense, per_site, "auto", None)


def _convolution(
    name: str,
    x: Features,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    geometry: Geometry,
    dense: Callable[[Tensor], Tensor],
    macs_per_site: float,
    backend: str,
    fill: Tensor | None,
    live: bool | None = None,
) -> Features:
    """A convolution by rows, or `dense`, which is the same of an ordinary map, where that is asked for or better."""
    selection, (window, out_grid) = x.selection, geometry
    if bias is not None and bias.shape != weight.shape[:1]:  # rows would broadcast a single number
        raise RuntimeError(f"the bias has shape {list(bias.shape)}, but the convolution {len(weight)} output channels")
    used: tuple[str, str | None] = ("reference", None)

    def operation() -> Operation:
        macs = round(len(selection.sites(out_grid)) * macs_per_site)
        all_macs = round(selection.batch * out_grid[0] * out_grid[1] * macs_per_site)
        return Operation(name, "guided", out_grid, macs, all_macs, *used)

    with selection.reporting(operation):
        asked = selection.options.backend if backend == "auto" else backend
        if isinstance(x, MaskedFeatures):
            return MaskedFeatures.make(dense(x.read(name)), selection, out_grid, full=False, fill=fill, live=live)
        assert isinstance(x, SparseFeatures)
        if asked == "auto" and _everything_is_active(x, out_grid):
            used = ("dense", None)
            return SparseFeatures.of_rows(as_rows(dense(x.whole())), selection, out_grid, fill=fill)
        used = backends.choose(asked, weight, groups)
        if window.pointwise and out_grid == x.grid:
            kernel_map, rows = None, as_rows(x.restricted())
        else:
            kernel_map, rows = selection.kernel_map(x.grid, x.full, window, out_grid), x.surrounded()
        out = backends.convolve(used[0], rows, weight, bias, groups, kernel_map)
        return SparseFeatures.of_rows(out, selection, out_grid, fill=fill)


def _everything_is_active(x: SparseFeatures, out_grid: Pair) -> bool:
    """Whether the dense operation computes what is asked for and no more; it is the fastest then."""
    return all(
        len(sites) == x.selection.batch * height * width
        for sites, (height, width) in ((x.sites, x.grid), (x.selection.sites(out_grid), out_grid))
    )


@lru_cache(maxsize=1024)
def _geometry(grid: Pair, kernel: Pair, stride: Pair, pads: Pads, dilation: Pair, padding_mode: str) -> Geometry:
    height, width = (
        (size + sum(pad) - step * (taps - 1) - 1) // by + 1
        for size, pad, step, taps, by in zip(grid, pads, dilation, kernel, stride, strict=True)
    )
    if height < 1 or width < 1:
        raise RuntimeError(f"the kernel {kernel} with dilation {dilation} is larger than the padded map {grid}")
    narrower = {"reflect": 1, "circular": 0}.get(padding_mode)  # than the map, by how much padding must be
    if narrower is not None and any(max(pad) > size - narrower for size, pad in zip(grid, pads, strict=True)):
        raise RuntimeError(f"{padding_mode} padding of {pads} is too wide for the map {grid}")
    return Geometry(Window(kernel, stride, (pads[0][0], pads[1][0]), dilation, padding_mode), (height, width))


def _joined(around: Padding, pads: Pads, padding_mode: str) -> tuple[Pads, str]:
    """What is around a map already, and a convolution's own padding, as one."""
    (top, bottom), (left, right) = pads
    if around.mode == "zeros" and around.value != 0:
        raise Leaves("reads a map padded by another number than zero")
    if any(pads[0] + pads[1]) and (around.crops or (around.mode, padding_mode) != ("zeros", "zeros")):
        raise Leaves("pads a padded map in another way")
    return ((around.top + top, around.bottom + bottom), (around.left + left, around.right + right)), around.mode


def _pads(padding: Any, kernel: Pair, dilation: Pair) -> Pads:
    """What a `padding` argument puts around a map."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        (top, bottom), (left, right) = (
            (total // 2, total - total // 2)
            for total in (step * (taps - 1) for step, taps in zip(dilation, kernel, strict=True))
        )
        return (top, bottom), (left, right)
    vertical, horizontal = pair(padding)
    return (vertical, vertical), (horizontal, horizontal)
