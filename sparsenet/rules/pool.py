"""Max and average pooling over windows, with `ceil_mode` and padding as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.atlas import route
from sparsenet.backends import indirect, triton
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads, Tables
from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, as_rows, rule
from sparsenet.rules.conv import pair
from sparsenet.sites import Pair, Window, dense_table
from sparsenet.work import OfActiveSites, OfAllPixels, Standalone, Work


class _Pooling:
    """A pooling operation on a map, padded or not: its window, its output's size, and what it reads beyond the map.

    `outside` is what the operation's own padding holds.
    """

    def __init__(
        self,
        pool: Callable[[Tensor], Tensor],
        x: Features,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        ceil_mode: bool,
        outside: float,
        average: bool,
    ):
        if x.form.order != "NCHW":
            raise Leaves(x.form.description)
        around = x.form.padding
        own, mode = pair(padding), "zeros"
        if around is not None:
            if around.mode == "zeros" and around.value != outside and (ceil_mode or outside == 0):
                raise Leaves("pools a map padded by another number")
            if (own != (0, 0) or ceil_mode) and (around.crops or around.mode != "zeros" or around.value != outside):
                raise Leaves("pads a padded map in another way")
            mode, outside = around.mode, around.value if around.mode == "zeros" else outside
        self.pool, self.around, self.x, self.outside = pool, around, x, outside
        self.padded = x.grid if around is None else around.around(x.grid)
        kernel = pair(kernel_size)
        by = kernel if stride is None or stride == [] else pair(stride)
        self.out_grid = _out_grid(average, self.padded, kernel, by, own, pair(dilation), ceil_mode)
        self.own = Window(kernel, by, own, pair(dilation))
        top, left = (0, 0) if around is None else (around.top, around.left)
        self.window = Window(kernel, by, (own[0] + top, own[1] + left), pair(dilation), mode)

    def dense(self, read: Tensor) -> Features:
        """In the dense storage."""
        read = read if self.around is None else self.around.apply(read)
        return MaskedFeatures.make(self.pool(read), self.x.selection, self.out_grid, full=False)

    def rows(self, operation: str) -> Tensor:
        """The "max" or "sum" of what each output site reads, (n_out, C): rows, zeros for inactive pixels, `outside`
        beyond the map."""
        x = self.x
        assert isinstance(x, SparseFeatures)
        kernel_map = x.selection.kernel_map(x.grid, x.full, self.window, self.out_grid)
        rows = x.rows
        kernels = _kernels(rows)
        if kernels is None:
            around = x.surrounded(self.outside)
            columns = around.index_select(0, kernel_map.table.view(-1)).view(-1, self.window.taps, rows.shape[1])
            if operation == "sum":
                return columns.sum(1)
            # `amax` is five times as fast, but shares a tie's gradient out, where pooling gives it to the first.
            return columns.max(1).values if columns.requires_grad else columns.amax(1)
        pooled: Tensor = kernels.pool(operation, rows, kernel_map.table, kernel_map.inputs, self.outside)
        return pooled

    def waiting(self) -> Features | None:
        """The maximum in a frozen network, not computed yet, or `None` if no kernel that waits computes it."""
        x = self.x
        selection, window, out_grid = x.selection, self.window, self.out_grid
        if not selection.queues or self.around is not None:
            return None
        if not (selection.everything or isinstance(x, SparseFeatures)):
            return None
        rows = x.computed()
        if _kernels(rows) is not indirect or not len(rows):
            return None
        tables: Tables
        if selection.everything:
            inputs, images, outputs = x.grid[0] * x.grid[1], selection.batch, out_grid[0] * out_grid[1]
            tables = OfAllPixels(x.grid, window, out_grid, rows.device)
        else:
            inputs, images, outputs = len(rows), 1, len(selection.sites(out_grid))
            tables = OfActiveSites(selection, route(x.grid, x.full, window, out_grid))
        reads = Reads(rows, tables, inputs, images * outputs, images, x.grid, out_grid, selection.everything)
        work = Work(MaxPool(rows.shape[1], self.outside), selection, reads, Epilogue())
        x.read_by(work)
        return type(x).deferred(work, selection, out_grid, full=False, fill=None)

    def unguided(self) -> Features | None:
        """The maximum over a map of a frozen network that no mask guides, on a device, or `None` if no kernel computes
        it."""
        x = self.x
        rows = as_rows(x.value)
        if not x.selection.everything or _kernels(rows) is not triton or not len(rows):
            return None
        table, each = dense_table(x.grid, self.window, self.out_grid, rows.device), x.grid[0] * x.grid[1]
        pooled = triton.pool("max", rows, table, each, self.outside, len(rows) // each)
        value = pooled.view(len(rows) // each, *self.out_grid, -1).permute(0, 3, 1, 2)
        return MaskedFeatures.make(value, x.selection, self.out_grid, full=False)


class MaxPool(Standalone):
    """A maximum over windows of rows.

    Args:
        outside: what a place outside the map holds.
    """

    path = "max_pool2d"

    def __init__(self, outputs: int, outside: float):
        super().__init__(outputs)
        self._outside = outside

    def ready(self, dtype: torch.dtype) -> indirect.Pooling:
        return indirect.pooling("max", self.outputs, dtype, self._outside)


@lru_cache(maxsize=1024)
def _out_grid(
    average: bool, grid: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Pair:
    """As PyTorch finds it, which refuses bad arguments."""
    of_nothing = torch.empty(1, 1, *grid, device="meta")
    if average:
        pooled = F.avg_pool2d(of_nothing, kernel, stride, padding, ceil_mode)
    else:
        pooled = F.max_pool2d(of_nothing, kernel, stride, padding, dilation, ceil_mode)
    _, _, height, width = pooled.shape
    return height, width


def _kernels(rows: Tensor) -> ModuleType | None:
    """The backend that pools rows by a kernel, or `None`, as where a gradient is to be found."""
    if (torch.is_grad_enabled() and rows.requires_grad) or rows.stride(1) != 1:
        return None
    backend = triton if rows.is_cuda else indirect
    return backend if backend.unsupported(rows, 1) is None else None


@rule(F.max_pool2d, torch.max_pool2d, any_form=True)
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

    pooling = _Pooling(pool, x, kernel_size, stride, padding, dilation, ceil_mode, outside=-torch.inf, average=False)
    waiting = pooling.waiting()
    if waiting is not None:
        return waiting
    if isinstance(x, MaskedFeatures):
        unguided = pooling.unguided()
        return pooling.dense(x.read("max_pool2d")) if unguided is None else unguided
    return SparseFeatures.of_rows(pooling.rows("max"), x.selection, pooling.out_grid)


@rule(F.avg_pool2d, any_form=True)
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

    if divisor_override == 0:
        raise RuntimeError("avg_pool2d would divide by zero: divisor_override is 0")
    pooling = _Pooling(pool, x, kernel_size, stride, padding, 1, ceil_mode, outside=0.0, average=True)
    if isinstance(x, MaskedFeatures):
        return pooling.dense(x.read("avg_pool2d"))
    sums = pooling.rows("sum")
    # What a window divides by depends on its place alone: the sum of its counts over the average of ones.
    out_grid = pooling.out_grid
    area = divisor_override or _areas(pooling.padded, pooling.own, out_grid, count_include_pad, sums.device)
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
