"""A wide map that only a depthwise layer reads, made and read in strips: it is never in memory as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsenet.backends import workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Norm, Reads
from sparsenet.constants import constant
from sparsenet.frozen_layer import WIDE, FrozenLayer
from sparsenet.sites import Pair, Window, dense_table
from sparsenet.work import Work

# Bytes of a strip, about. Of those between 1.5 and 10 MB the time differs by 15 %.
STRIP = 3 << 20


def widened(work: Work, layer: FrozenLayer) -> bool:
    """Whether a depthwise layer that reads all pixels of one image can have the result of this work, a pointwise
    layer's, in strips."""
    first = work.layer
    if not isinstance(first, FrozenLayer) or work.selection.batch != 1 or work.selection.observers:
        return False
    if work.reads.tables is not None or work.reads.gate is not None or layer.spec.groups != layer.outputs:
        return False
    if work.reads.outputs * first.outputs * first.dtype.itemsize < WIDE or layer.shape[1] != 1:
        return False
    return first.kernels is not None and layer.kernels is not None and work.unshared()


class Strips:
    """The `Layer` of a depthwise layer and of the pointwise one before it."""

    def __init__(self, narrow: Work, layer: FrozenLayer, window: Window):
        self.narrow = narrow
        self.layer = layer
        self.window = window
        self.path = layer.path
        self.outputs = layer.outputs
        self.breaks = layer.breaks

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        first = self.narrow.layer
        assert isinstance(first, FrozenLayer) and first.kernels is not None and self.layer.kernels is not None
        widen, narrow = first.kernels.ready(self.narrow.epilogue), self.narrow.epilogue.residual
        reduce, residual = self.layer.kernels.ready(epilogue), epilogue.residual
        (_, width), (out_height, _) = reads.grid, reads.out_grid
        line = self.outputs * reads.rows.element_size() * width * self.window.stride[0]
        strips = _strips(reads.grid, self.window, reads.out_grid, min(out_height, max(1, STRIP // line)))
        strip = workspace.empty(max(each.inputs for each in strips), self.outputs, reads.rows)
        out = workspace.empty(reads.outputs, self.outputs, reads.rows)
        done = 0
        for each in strips:
            read = slice(each.first, each.first + each.inputs)
            written = slice(done, done + len(each.table))
            widen.run(reads.rows[read], None if narrow is None else narrow[read], None, each.inputs, strip)
            part = None if residual is None else residual[written]
            reduce.run(strip, part, each.table, each.inputs, out[written])
            done = written.stop
        return out

    def normalised(self, epilogue: Epilogue, norm: Norm) -> Epilogue | None:
        return self.layer.normalised(epilogue, norm)

    def scaled(self, epilogue: Epilogue, factor: Tensor, cells: Tensor) -> Epilogue | None:
        return self.layer.scaled(epilogue, factor, cells)


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
