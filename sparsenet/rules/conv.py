"""Convolution over active sites."""

from __future__ import annotations

from contextlib import ExitStack
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
    kernel, stride, dilation = pair(weight.shape[2:]), pair(stride), pair(dilation)
    (top, bottom), (left, right) = pads = _pads(padding, kernel, dilation)
    window = Window(kernel, stride, (top, left), dilation, padding_mode)
    out_grid = tuple(
        (size + sum(pad) - step * (taps - 1) - 1) // by + 1
        for size, pad, step, taps, by in zip(x.grid, pads, dilation, kernel, stride, strict=True)
    )
    height, width = out_grid
    if height < 1 or width < 1:
        raise RuntimeError(f"the kernel {kernel} with dilation {dilation} is larger than the padded map {x.grid}")
    narrower = {"reflect": 1, "circular": 0}.get(padding_mode)  # than the map, by how much padding must be
    if narrower is not None and any(max(pad) > size - narrower for size, pad in zip(x.grid, pads, strict=True)):
        raise RuntimeError(f"{padding_mode} padding of {pads} is too wide for the map {x.grid}")
    selection = x.selection
    macs_per_site = weight.shape[1] * weight.shape[0] * window.taps
    name, reason = "reference", None
    with ExitStack() as uncounted:
        for observer in selection.observers:
            uncounted.enter_context(observer.uncounted())
        if isinstance(x, SparseFeatures):
            asked = selection.backend if backend == "auto" else backend
            name, reason = backends.choose(asked, weight, groups)
            if window.pointwise:
                kernel_map, rows = None, as_rows(x.restricted())
            else:
                kernel_map, rows = selection.kernel_map(x.grid, x.full, window, (height, width)), x.rows
            out = backends.convolve(name, rows, weight, bias, groups, kernel_map)
            result = SparseFeatures.of_rows(out, selection, (height, width), fill=fill)
        else:
            assert isinstance(x, MaskedFeatures)
            read = x.read("conv2d")
            if any((top, bottom, left, right)):
                mode = "constant" if padding_mode == "zeros" else padding_mode
                read = F.pad(read, (left, right, top, bottom), mode=mode)
            value = F.conv2d(read, weight, bias, stride, 0, dilation, groups)
            result = MaskedFeatures.make(value, selection, (height, width), full=False, fill=fill)
        if selection.observers:
            active = len(selection.sites((height, width)))
            selection.report(
                Operation(
                    "conv2d",
                    "guided",
                    (height, width),
                    active * macs_per_site,
                    selection.batch * height * width * macs_per_site,
                    name,
                    reason,
                )
            )
    return result


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
