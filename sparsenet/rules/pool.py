"""Max and average pooling over windows, with `ceil_mode` and padding as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, rule
from sparsenet.rules.conv import pair
from sparsenet.sites import Pair, Window


def _window(
    pool: Callable[[Tensor], Tensor], x: Features, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1
) -> tuple[Window, Pair]:
    """The window of a pooling operation, and the size of its output, which PyTorch tells, and whether it is allowed."""
    kernel = pair(kernel_size)
    stride = kernel if stride is None or stride == [] else pair(stride)
    _, _, height, width = pool(torch.empty(1, 1, *x.grid, device="meta")).shape
    return Window(kernel, stride, pair(padding), pair(dilation)), (height, width)


def _columns(x: SparseFeatures, window: Window, out_grid: Pair, outside: float) -> Tensor:
    """What each output site reads, (n_out, taps, C): rows, zeros for inactive pixels, `outside` beyond the image."""
    kernel_map = x.selection.kernel_map(x.grid, x.full, window, out_grid)
    rows = x.surrounded(outside)
    return rows.index_select(0, kernel_map.table.view(-1)).view(-1, window.taps, rows.shape[1])


@rule(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    func: Any,
    input: Features,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Features:
    x = input
    if return_indices:
        raise Leaves("gives indices into the whole map")

    def pool(dense: Tensor) -> Tensor:
        return F.max_pool2d(dense, kernel_size, stride, padding, dilation, ceil_mode)

    window, out_grid = _window(pool, x, kernel_size, stride, padding, dilation)
    if isinstance(x, MaskedFeatures):
        return MaskedFeatures.make(pool(x.read("max_pool2d")), x.selection, out_grid, full=False)
    assert isinstance(x, SparseFeatures)
    columns = _columns(x, window, out_grid, outside=-torch.inf)
    # `amax` is five times as fast, but shares a tie's gradient out, where pooling gives it to the first.
    rows = columns.max(1).values if columns.requires_grad else columns.amax(1)
    return SparseFeatures.of_rows(rows, x.selection, out_grid)


@rule(F.avg_pool2d)
def avg_pool2d(
    func: Any,
    input: Features,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Features:
    x = input

    def pool(dense: Tensor) -> Tensor:
        return F.avg_pool2d(dense, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    window, out_grid = _window(pool, x, kernel_size, stride, padding)
    if isinstance(x, MaskedFeatures):
        return MaskedFeatures.make(pool(x.read("avg_pool2d")), x.selection, out_grid, full=False)
    assert isinstance(x, SparseFeatures)
    sums = _columns(x, window, out_grid, outside=0.0).sum(1)
    # What a window divides by depends on its place alone: the sum of its counts over the average of ones.
    area = divisor_override or _areas(x.grid, window, out_grid, count_include_pad, sums.device)
    if isinstance(area, Tensor):
        place = x.selection.sites(out_grid).index % (out_grid[0] * out_grid[1])
        area = area.flatten().index_select(0, place)[:, None].to(sums.dtype)
    return SparseFeatures.of_rows(sums / area, x.selection, out_grid)


def _areas(grid: Pair, window: Window, out_grid: Pair, count_include_pad: bool, device: torch.device) -> Tensor:
    """How many pixels each window divides by, (H, W): all that lie in the image, or in the image and its padding
    (never beyond the padding, where `ceil_mode` lets windows reach)."""
    lengths = []
    for size, out, taps, by, pad in zip(grid, out_grid, window.kernel, window.stride, window.padding, strict=True):
        start = torch.arange(out, device=device) * by - pad
        low, high = (-pad, size + pad) if count_include_pad else (0, size)
        lengths.append((start + taps).clamp(max=high) - start.clamp(min=low))
    return lengths[0][:, None] * lengths[1][None, :]
