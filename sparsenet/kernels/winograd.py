"""The kernel of 3x3 convolution by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308).

Each tile of 2x2 outputs takes 16 multiplications in place of 36 for each pair of channels. A thread transforms the
inputs of some tiles, multiplies them as 16 small matrix products, and transforms the sums back, all within its cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparsenet.kernels.convolution import Finish, multiplied, tile
from sparsenet.kernels.machine import Kernel, Launch

FIELDS = (
    # Addresses: see `sparsenet.kernels.convolution.FIELDS`. `reads` has the input rows of a tile's 4x4 window, `writes`
    # the output rows of its 2x2 pixels, and each thread takes its own part of `scratch`.
    *("rows", "reads", "writes", "weights", "scale", "shift", "residual", "out", "zeros", "scratch"),
    # Tiles, channels, and these in whole vectors; elements from row to row of input and output, outputs.
    *("tiles", "channels", "padded", "row_stride", "out_stride", "outputs"),
    # Panels, tiles and panels of a piece, input and output rows, elements of a thread's scratch.
    *("panels", "piece_tiles", "piece_panels", "inputs", "sites", "thread_scratch"),
    # Threads that have begun, and pieces taken so far.
    *("begun", "taken"),
    # The activation's parameters, float64.
    *("low", "high"),
)

# Elements between what would otherwise lie a multiple of 4 KiB apart, and so in the same few lines of the first cache.
APART = 16


def transformed(weight: Tensor) -> Tensor:
    """G g Gᵀ of weights (O, C, 3, 3), computed in float64: (16, O, C)."""
    by_line = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    both = torch.einsum("ij,ocjk,lk->iloc", by_line, weight.double(), by_line)
    return both.flatten(0, 1).to(weight.dtype)


def scratch(piece_tiles: int, padded: int, width: int) -> int:
    """Elements of memory that a thread needs."""
    return 16 * (piece_tiles * (padded + width) + 2 * APART)


@functools.cache
def product(vectors: int, whole: bool, dtype: torch.dtype, residual: str | None, activation: str) -> Launch:
    """The kernel, for panels of so many vectors of outputs; see `sparsenet.kernels.convolution.product`.

    Weights are packed (panels, 16, channels, vectors · lanes), zero beyond the outputs.
    """
    kernel = Kernel(f"winograd_{vectors}_{whole}_{dtype.itemsize}_{residual}_{activation}", FIELDS, dtype)
    build, together, width = kernel.build, tile(vectors), vectors * kernel.lanes
    rows, weights, zeros = map(kernel.pointer, ("rows", "weights", "zeros"))
    reads, writes = kernel.pointer("reads", integers=True), kernel.pointer("writes", integers=True)
    tiles, channels, padded, row_stride = map(kernel.field, ("tiles", "channels", "padded", "row_stride"))
    piece_tiles, piece_panels, panels = map(kernel.field, ("piece_tiles", "piece_panels", "panels"))
    inputs, sites, outputs = map(kernel.field, ("inputs", "sites", "outputs"))
    finish = Finish(kernel, residual, activation)
    slot = build.atomic_rmw("add", kernel.place("begun"), kernel.integer(1), "monotonic")
    own = kernel.at(kernel.pointer("scratch"), build.mul(slot, kernel.field("thread_scratch")))
    apart = kernel.integer(APART)
    input_plane = build.add(build.mul(piece_tiles, padded), apart)
    sums = kernel.at(own, build.mul(input_plane, kernel.integer(16)))
    sum_plane = build.add(build.mul(piece_tiles, kernel.integer(width)), apart)
    whole_vectors = build.mul(build.sdiv(channels, kernel.integer(kernel.lanes)), kernel.integer(kernel.lanes))
    tile_pieces = kernel.parts(tiles, piece_tiles)
    panel_size = build.mul(channels, kernel.integer(16 * width))

    def gather(pointers: list[Any], target: Any, channel: Any, mask: Any) -> None:
        """Bᵀ d B of one vector of channels of one tile."""
        lines = [[kernel.load(kernel.at(pointers[4 * y + x], channel), mask) for x in range(4)] for y in range(4)]
        for place, value in enumerate(chain.from_iterable(_both(build, _input_transform, lines))):
            kernel.store(value, kernel.at(target, build.mul(input_plane, kernel.integer(place)), channel))

    with kernel.pieces(build.mul(build.sdiv(panels, piece_panels), tile_pieces)) as piece:
        first_panel = build.mul(build.sdiv(piece, tile_pieces), piece_panels)
        first = build.mul(build.srem(piece, tile_pieces), piece_tiles)
        count = kernel.smaller(build.sub(tiles, first), piece_tiles)
        with kernel.loop(count) as over_tiles:
            read = kernel.at(reads, build.mul(build.add(first, over_tiles.index), kernel.integer(16)))
            pointers = []
            for place in range(16):
                row = build.sext(build.load(kernel.at(read, place)), kernel.index_type)
                there = kernel.at(rows, build.mul(row, row_stride))
                pointers.append(build.select(build.icmp_signed("<", row, inputs), there, zeros))
            target = kernel.at(own, build.mul(over_tiles.index, padded))
            with kernel.loop(whole_vectors, step=kernel.lanes) as over_channels:
                gather(pointers, target, over_channels.index, None)
            rest = build.sub(channels, whole_vectors)
            with build.if_then(build.icmp_signed(">", rest, kernel.integer(0))):
                gather(pointers, target, whole_vectors, kernel.first_lanes(rest))
        with kernel.loop(piece_panels) as over_panels:
            panel = build.add(first_panel, over_panels.index)
            panel_weights = kernel.at(weights, build.mul(panel, panel_size))
            with kernel.loop(kernel.integer(16)) as over_places, kernel.loop(count, step=together) as over_tiles:
                place = over_places.index
                begin = kernel.at(panel_weights, build.mul(place, build.mul(channels, kernel.integer(width))))
                plane = kernel.at(own, build.mul(place, input_plane))
                last = build.sub(count, kernel.integer(1))
                # Beyond the last tile, the last one is computed again.
                targets = [
                    kernel.smaller(build.add(over_tiles.index, kernel.integer(each)), last) for each in range(together)
                ]
                pointers = [kernel.at(plane, build.mul(target, padded)) for target in targets]
                carried = [*[kernel.zero] * (together * vectors), begin]
                with kernel.loop(channels, carried) as inner:
                    *found, weight = inner.values
                    found = multiplied(kernel, pointers, inner.index, weight, found)
                    inner.following = [*found, kernel.at(weight, width)]
                *found, _ = inner.values
                plane = kernel.at(sums, build.mul(place, sum_plane))
                for at, target in enumerate(targets):
                    for vector in range(vectors):
                        there = kernel.at(plane, build.mul(target, kernel.integer(width)), vector * kernel.lanes)
                        kernel.store(found[at * vectors + vector], there)
            with kernel.loop(count) as over_tiles:
                write = kernel.at(writes, build.mul(build.add(first, over_tiles.index), kernel.integer(4)))
                targets = [build.sext(build.load(kernel.at(write, each)), kernel.index_type) for each in range(4)]
                source = kernel.at(sums, build.mul(over_tiles.index, kernel.integer(width)))
                with kernel.loop(kernel.integer(width), step=kernel.lanes) as over_vectors:
                    channel = build.add(build.mul(panel, kernel.integer(width)), over_vectors.index)
                    mask = None if whole else kernel.first_lanes(build.sub(outputs, channel))
                    values = [
                        kernel.load(kernel.at(source, build.mul(sum_plane, kernel.integer(place)), over_vectors.index))
                        for place in range(16)
                    ]
                    lines = _both(build, _output_transform, [values[4 * y : 4 * y + 4] for y in range(4)])
                    for value, site in zip(chain.from_iterable(lines), targets, strict=True):
                        with build.if_then(build.icmp_signed("<", site, sites), likely=True):
                            finish([value], [site], channel, channel, mask)
    return kernel.compiled()


def _input_transform(build: Any, line: tuple[Any, ...]) -> list[Any]:
    """Bᵀ d along one axis."""
    a, b, c, d = line
    return [build.fsub(a, c), build.fadd(b, c), build.fsub(c, b), build.fsub(b, d)]


def _output_transform(build: Any, line: tuple[Any, ...]) -> list[Any]:
    """Aᵀ m along one axis."""
    a, b, c, d = line
    return [build.fadd(build.fadd(a, b), c), build.fsub(build.fsub(b, c), d)]


def _both(
    build: Any, transform: Callable[[Any, tuple[Any, ...]], list[Any]], lines: list[list[Any]]
) -> list[list[Any]]:
    """A transform along both axes."""
    columns = [transform(build, column) for column in zip(*lines, strict=True)]
    return [transform(build, line) for line in zip(*columns, strict=True)]
