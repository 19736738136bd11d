"""A wide map between a pointwise layer and a depthwise one, made and read in strips: it is never in memory as a whole.
Nor is what the depthwise layer makes, if a pointwise one reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsenet.backends import workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.indirect import Prepared
from sparsenet.backends.ways import Norm, Reads
from sparsenet.constants import constant
from sparsenet.frozen_layer import WIDE, FrozenLayer
from sparsenet.kernels import convolution
from sparsenet.kernels.queue import Job
from sparsenet.sites import Pair, Window, dense_table
from sparsenet.work import Layer, Work

# Bytes of a strip, about. With what the depthwise layer makes of it, it stays in a core's own cache of 2 MB
# (MobileNetV2 at 448x448: 3 MB takes 1.04 of the time, 1 MB 1.03).
STRIP = 3 << 19

PLACES = {name: place for place, name in enumerate(convolution.FIELDS)}


def in_strips(work: Work, layer: FrozenLayer, window: Window | None) -> Strips | None:
    """A layer that reads the result of work of all pixels, and the layers before it, of whose results none is whole; or
    `None` where it is not a depthwise layer behind a pointwise one that makes a wide map of one image, or a pointwise
    layer behind these.

    Args:
        window: of the layer; `None` if it is pointwise.
    """
    before = work.layer
    if layer.kernels("everything") is None or work.selection.batch != 1 or work.selection.observers:
        return None
    if window is None:
        if not isinstance(before, Strips) or before.wide is not None or layer.spec.groups > 1 or not work.unshared():
            return None
        return Strips(before.narrow, before.window, layer, work)
    if not isinstance(before, FrozenLayer) or before.kernels("everything") is None:
        return None
    if work.reads.tables is not None or work.reads.gate is not None or layer.spec.groups != layer.outputs:
        return None
    if work.reads.outputs * before.outputs * before.dtype.itemsize < WIDE or layer.shape[1] != 1:
        return None
    return Strips(work, window, layer) if work.unshared() else None


class Strips:
    """The `Layer` of a depthwise layer and of the pointwise one before it, and maybe of one behind it.

    Args:
        narrow: the work of the first layer.
        window: of the depthwise layer.
        layer: the last one.
        wide: the work of the depthwise layer, if it is not the last.
    """

    def __init__(self, narrow: Work, window: Window, layer: FrozenLayer, wide: Work | None = None):
        self.narrow = narrow
        self.window = window
        self.layer = layer
        self.wide = wide
        self.path = layer.path
        self.outputs = layer.outputs
        self.breaks = layer.breaks

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        rows, (_, width), (out_height, _) = reads.rows, reads.grid, reads.out_grid
        channels = self.narrow.outputs
        line = channels * rows.element_size() * width * self.window.stride[0]
        strips = _strips(reads.grid, self.window, reads.out_grid, min(out_height, max(1, STRIP // line)))
        strip = workspace.empty(max(each.inputs for each in strips), channels, rows)
        out = workspace.empty(reads.outputs, self.outputs, rows)
        first, added = _kernel(self.narrow.layer, self.narrow.epilogue)
        last, residual = _kernel(self.layer, epilogue)
        widening = first.job(rows, added, None, strip.shape[0], strip)
        if self.wide is None:
            reducing, finishing = last.job(strip, residual, strips[0].table, strip.shape[0], out), None
        else:
            inner = workspace.empty(max(each.table.shape[0] for each in strips), channels, rows)
            middle, beside = _kernel(self.wide.layer, self.wide.epilogue)
            reducing = middle.job(strip, beside, strips[0].table, strip.shape[0], inner)
            finishing = last.job(inner, residual, None, inner.shape[0], out)
        reducing.held = (*reducing.held, strips)
        done = 0
        for each in strips:
            read = {"sites": each.inputs, "inputs": each.inputs}
            _wait(widening, rows=_address(rows, each.first), residual=_address(added, each.first), **read)
            sites = each.table.shape[0]
            made = {"table": each.table.data_ptr(), "sites": sites, "inputs": each.inputs}
            written = {"residual": _address(residual, done), "out": _address(out, done)}
            if finishing is None:
                _wait(reducing, **made, **written)
            else:
                _wait(reducing, **made, residual=_address(beside, done))
                _wait(finishing, sites=sites, inputs=sites, **written)
            done += sites
        return out

    def normalised(self, epilogue: Epilogue, norm: Norm) -> Epilogue | None:
        return self.layer.normalised(epilogue, norm)

    def scaled(self, epilogue: Epilogue, factor: Tensor, cells: Tensor) -> Epilogue | None:
        return self.layer.scaled(epilogue, factor, cells)


def _kernel(layer: Layer, epilogue: Epilogue) -> tuple[Prepared, Tensor | None]:
    """What computes a layer, of strips the last one, and the rows that it adds."""
    layer = layer.layer if isinstance(layer, Strips) else layer
    assert isinstance(layer, FrozenLayer)
    way = layer.kernels("everything")
    assert way is not None
    return way.ready(epilogue), epilogue.residual


def _wait(job: Job, **fields: int) -> None:
    """Let a kernel wait to run on a part of a map that lies elsewhere in the same memory."""
    for name, number in fields.items():
        job.numbers[PLACES[name]] = number
    job.wait()


def _address(rows: Tensor | None, row: int) -> int:
    """Of a row of contiguous rows; 0 if there are none."""
    return 0 if rows is None else rows.data_ptr() + row * rows.stride(0) * rows.element_size()


class Strip(NamedTuple):
    """Some lines of outputs.

    Attributes:
        first, inputs: the first row that is read, and how many.
        table: int32 (n_out, taps), counted from the first.
    """

    first: int
    inputs: int
    table: Tensor


@constant(16)
def _strips(grid: Pair, window: Window, out_grid: Pair, lines: int) -> list[Strip]:
    """An image's outputs in strips of so many lines."""
    pixels, strips = grid[0] * grid[1], []
    for table in dense_table(grid, window, out_grid, torch.device("cpu")).split(lines * out_grid[1]):
        inside = table[table < pixels]
        first, last = (int(inside.min()), int(inside.max())) if len(inside) else (0, -1)
        count = last - first + 1
        strips.append(Strip(first, count, torch.where(table < pixels, table - first, count)))
    return strips
