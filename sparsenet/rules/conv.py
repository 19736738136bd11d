"""Convolution over active sites."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet import backends
from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, as_rows, rule
from sparsenet.selection import Operation
from sparsenet.sites import Pair, Window


def pair(value: Any) -> Pair:
    """PyTorch's int-or-tuple arguments as (vertical, horizontal)."""
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return int(first), int(rest[0] if rest else first)


@rule(F.conv2d, torch.conv2d)
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
) -> Features:
    """`torch.nn.functional.conv2d` of guided features: computed at the active sites of the output's size only.

    Equals the dense convolution of the input, zero at its inactive pixels (full features: read whole), kept at
    the output's active pixels. SCN (arXiv 2002.01205), section 3: im2col, select rows, matrix product.

    Args:
        x: (N, C, H, W).
        weight: (O, C / groups, kh, kw); the other arguments are those of `torch.nn.Conv2d`.
        backend: the layer's own choice; `use_backend` goes before it, the selection's comes after.
        fill: what the result holds at inactive pixels when it leaves the region, (O,).
    """
    window, pads, out_grid = _geometry(
        x.grid,
        pair(weight.shape[2:]),
        pair(stride),
        padding if isinstance(padding, str) else pair(padding),
        pair(dilation),
        padding_mode,
    )
    selection = x.selection
    if not selection.observers:
        return _convolve(x, weight, bias, groups, window, pads, out_grid, backend, fill)[0]
    with ExitStack() as uncounted:
        for observer in selection.observers:
            uncounted.enter_context(observer.uncounted())
        result, name, reason = _convolve(x, weight, bias, groups, window, pads, out_grid, backend, fill)
        macs_per_site = weight.shape[1] * weight.shape[0] * window.taps
        macs = len(selection.sites(out_grid)) * macs_per_site
        dense_macs = selection.batch * out_grid[0] * out_grid[1] * macs_per_site
    selection.report(Operation("conv2d", "guided", out_grid, macs, dense_macs, name, reason))
    return result


def _convolve(
    x: Features,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    window: Window,
    pads: tuple[Pair, Pair],
    out_grid: Pair,
    backend: str,
    fill: Tensor | None,
) -> tuple[Features, str, str | None]:
    """The result, the backend that computed it, and why it is not the one asked for, if it is not."""
    selection = x.selection
    asked = selection.backend if backend == "auto" else backend
    if isinstance(x, SparseFeatures) and not (asked == "auto" and _everything_is_active(x, out_grid)):
        name, reason = backends.choose(asked, weight, groups)
        if window.pointwise:
            kernel_map, rows = None, as_rows(x.restricted())
        else:
            kernel_map, rows = selection.kernel_map(x.grid, x.full, window, out_grid), x.surrounded()
        out = backends.convolve(name, rows, weight, bias, groups, kernel_map)
        return SparseFeatures.of_rows(out, selection, out_grid, fill=fill), name, reason
    read = x.read("conv2d") if isinstance(x, MaskedFeatures) else x.whole()
    (top, bottom), (left, right) = pads
    padding = (top, left)
    if window.padding_mode != "zeros" or (bottom, right) != padding:
        mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
        read, padding = F.pad(read, (left, right, top, bottom), mode=mode), (0, 0)
    value = F.conv2d(read, weight, bias, window.stride, padding, window.dilation, groups)
    if isinstance(x, MaskedFeatures):
        return MaskedFeatures.make(value, selection, out_grid, full=False, fill=fill), "reference", None
    return SparseFeatures.of_rows(as_rows(value), selection, out_grid, fill=fill), "dense", None


def _everything_is_active(x: SparseFeatures, out_grid: Pair) -> bool:
    """Whether the dense operation computes what is asked for and no more; it is the fastest then."""
    return all(
        len(sites) == x.selection.batch * height * width
        for sites, (height, width) in ((x.sites, x.grid), (x.selection.sites(out_grid), out_grid))
    )


@lru_cache(maxsize=1024)
def _geometry(
    grid: Pair, kernel: Pair, stride: Pair, padding: Any, dilation: Pair, padding_mode: str
) -> tuple[Window, tuple[Pair, Pair], Pair]:
    """The window, what is padded as ((top, bottom), (left, right)), and the output's size."""
    pads = _pads(padding, kernel, dilation)
    height, width = (
        (size + sum(pad) - step * (taps - 1) - 1) // by + 1
        for size, pad, step, taps, by in zip(grid, pads, dilation, kernel, stride, strict=True)
    )
    if height < 1 or width < 1:
        raise RuntimeError(f"the kernel {kernel} with dilation {dilation} is larger than the padded map {grid}")
    narrower = {"reflect": 1, "circular": 0}.get(padding_mode)  # than the map, by how much padding must be
    if narrower is not None and any(max(pad) > size - narrower for size, pad in zip(grid, pads, strict=True)):
        raise RuntimeError(f"{padding_mode} padding of {pads} is too wide for the map {grid}")
    return Window(kernel, stride, (pads[0][0], pads[1][0]), dilation, padding_mode), pads, (height, width)


def _pads(padding: Any, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """((top, bottom), (left, right)) of a `padding` argument."""
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
