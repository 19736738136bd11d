"""A frozen detector's heads: layers that each read a map of their own and leave the guided region, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sparsenet.atlas import route
from sparsenet.backends import indirect, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Winograd
from sparsenet.chains import hooked
from sparsenet.features import SparseFeatures
from sparsenet.frozen_modules import FrozenConv2d
from sparsenet.kernels import queue
from sparsenet.selection import Selection
from sparsenet.sites import Pair
from sparsenet.work import OfActiveSites


def side_by_side(layers: Sequence[Any], maps: Sequence[Any]) -> Tensor | None:
    """What convolutions give of guided maps, each of its own, `fill` at inactive pixels: (N, Σ H · W · O), of an image
    one map behind the other, in channels-last order. `None` where anything but kernels that wait computes them.

    SSD300 has a dozen such layers, whose results else leave the region one by one, are put in order, and copied
    together, which takes longer than to compute them.
    """
    selection = maps[0].selection if isinstance(maps[0], SparseFeatures) else None
    if selection is None or not selection.queues or selection.options.backend != "auto":
        return None
    if selection.followed or selection.options.strict:
        return None
    reads = [_Read.of(layer, x, selection) for layer, x in zip(layers, maps, strict=True)]
    batch, found = selection.batch, [read for read in reads if read is not None]
    if len(found) < len(reads):
        return None
    rows = [x.computed() for x in maps]
    counts = [len(selection.sites(read.out_grid)) for read in found]
    # What a layer gives is spread before the next one is computed.
    own = workspace.empty(max(count * read.outputs for count, read in zip(counts, found, strict=True)), 1, rows[0])
    length = sum(read.length for read in found)
    result, first = rows[0].new_empty(batch, length), 0
    for read, own_rows, count in zip(found, rows, counts, strict=True):
        out = own.as_strided((count, read.outputs), (read.outputs, 1))
        read.kernel.job(own_rows, None, read.table, own_rows.shape[0], out).wait()
        pooling, spread = indirect.pooling("sum", read.outputs, out.dtype, 0.0), selection.spread(read.out_grid)
        for image, pixels in enumerate(spread.split(read.pixels) if batch > 1 else [spread]):
            part = result.as_strided((read.pixels, read.outputs), (read.outputs, 1), image * length + first)
            pooling.job(out, None, pixels, count, part, read.layer._buffers["fill"]).wait()
        first += read.length
    queue.finish()
    return result


class _Read(NamedTuple):
    """A layer, its kernel, and where it reads a map."""

    layer: FrozenConv2d
    kernel: Any
    table: Any
    out_grid: Pair

    @property
    def outputs(self) -> int:
        return self.layer.out_channels

    @property
    def pixels(self) -> int:
        return self.out_grid[0] * self.out_grid[1]

    @property
    def length(self) -> int:
        """Of what it gives of an image."""
        return self.pixels * self.outputs

    @staticmethod
    def of(layer: Any, x: Any, selection: Selection) -> _Read | None:
        if type(layer) is not FrozenConv2d or hooked(layer) or not isinstance(x, SparseFeatures):
            return None
        way = layer.layer.waiting("guided")
        fits = x.selection is selection and x.form.plain and x.form.channels[0] == layer.in_channels
        if way is None or not fits or x.dtype != layer.layer.dtype:
            return None
        (window, out_grid), pointwise = layer.geometry(x.form, x.grid)
        table: Any = None
        if x.full or not pointwise:
            tables = OfActiveSites(selection, route(x.grid, x.full, window, out_grid))
            table = tables.tiles() if isinstance(way, Winograd) else tables.table()
        layer.layer.count("guided")
        return _Read(layer, way.ready(Epilogue(shift=layer._parameters["bias"])), table, out_grid)
