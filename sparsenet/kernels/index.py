"""Kernels of index arithmetic: where the active pixels are, and which rows the taps of a window read."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsenet.kernels.machine import Kernel, Launch

# The numbers of the kernels' jobs.
ANY_OF = ("mask", "lines", "columns", "result", "images", "height", "width", "out_height", "out_width")
SITES = ("mask", "index", "rank", "images", "height", "width", "count")
TABLE = ("places", "index", "rank", "table", "sites", "taps", "pixels", "plane")


def sites(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The active pixels of a mask, bool (N, H, W), as `sparsenet.sites.ActiveSites` has them: `index` and `rank`."""
    batch, height, width = mask.shape
    mask = mask.contiguous()
    index = torch.empty(mask.numel(), dtype=torch.int64)
    rank = torch.empty(batch, height + 1, width + 1, dtype=torch.int32)
    job = sites_kernel()((mask.data_ptr(), index.data_ptr(), rank.data_ptr(), batch, height, width, 0), 1)
    return index.narrow(0, 0, job[-1]), rank  # a quarter of what it takes to slice


def table(places: Tensor, index: Tensor, rank: Tensor) -> Tensor:
    """The row that each tap of each site reads: int32 (n_out, taps).

    Args:
        places: int32 (H_out * W_out, taps), where in one image's flattened rank image each tap reads.
        index: int64 (n_out,), the sites.
        rank: int32 (N, H + 1, W + 1).
    """
    places, index, rank = places.contiguous(), index.contiguous(), rank.contiguous()
    (pixels, taps), count = places.shape, index.shape[0]  # `len` of a tensor takes longer
    result = torch.empty(count, taps, dtype=torch.int32)
    plane = rank.shape[1] * rank.shape[2]
    pointers = places.data_ptr(), index.data_ptr(), rank.data_ptr(), result.data_ptr()
    table_kernel()((*pointers, count, taps, pixels, plane), 1)
    return result


def any_of(mask: Tensor, lines: Tensor, columns: Tensor) -> Tensor:
    """Which cells of a grid hold an active pixel: bool (N, h, w).

    Args:
        mask: bool (N, H, W).
        lines, columns: int32 (h, 2) and (w, 2), the first line and column of each cell and the one behind its last.
    """
    batch, height, width = mask.shape
    mask, out_height, out_width = mask.contiguous(), lines.shape[0], columns.shape[0]  # see `table`
    result = torch.empty(batch, out_height, out_width, dtype=torch.bool)
    pointers = mask.data_ptr(), lines.data_ptr(), columns.data_ptr(), result.data_ptr()
    any_of_kernel()((*pointers, batch, height, width, out_height, out_width), 1)
    return result


def all_of(mask: Tensor) -> bool:
    """Whether all pixels of a mask, bool of any shape, are active."""
    mask = mask.contiguous()
    return bool(_all_of()((mask.data_ptr(), mask.numel(), 0), 1)[-1])


@functools.cache
def _all_of() -> Launch:
    kernel = Kernel("all_of", ("mask", "pixels", "all"), torch.float32)
    build, byte = kernel.build, kernel.ir.IntType(8)
    mask = build.inttoptr(kernel.field("mask"), byte.as_pointer())
    with kernel.loop(kernel.field("pixels"), [kernel.ir.Constant(byte, 1)]) as pixels:
        pixels.following = [build.and_(pixels.values[0], build.load(kernel.at(mask, pixels.index)))]
    build.store(build.zext(pixels.values[0], kernel.index_type), kernel.place("all"))
    return kernel.compiled()


@functools.cache
def sites_kernel() -> Launch:
    kernel = Kernel("sites", SITES, torch.float32)
    build, ir = kernel.build, kernel.ir
    byte, narrow = ir.IntType(8), ir.IntType(32)
    mask = build.inttoptr(kernel.field("mask"), byte.as_pointer())
    index = build.inttoptr(kernel.field("index"), kernel.index_type.as_pointer())
    rank = kernel.pointer("rank", integers=True)
    images, height, width = map(kernel.field, ("images", "height", "width"))
    one = kernel.integer(1)
    with kernel.loop(build.mul(images, build.mul(height, width)), [kernel.integer(0)]) as pixels:
        active = build.zext(build.load(kernel.at(mask, pixels.index)), kernel.index_type)
        pixels.following = [build.add(pixels.values[0], active)]
    total = pixels.values[0]
    inactive, outside = build.trunc(total, narrow), build.trunc(build.add(total, one), narrow)
    wide = build.add(width, one)
    with kernel.loop(images, [kernel.integer(0)]) as over_images:
        place = build.mul(over_images.index, build.mul(build.add(height, one), wide))
        first = build.mul(over_images.index, build.mul(height, width))
        with kernel.loop(height, over_images.values) as lines:
            line = build.add(place, build.mul(lines.index, wide))
            start = build.add(first, build.mul(lines.index, width))
            with kernel.loop(width, lines.values) as columns:
                pixel, (count,) = build.add(start, columns.index), columns.values
                active = build.load(kernel.at(mask, pixel))
                row = build.select(build.trunc(active, ir.IntType(1)), build.trunc(count, narrow), inactive)
                build.store(row, kernel.at(rank, line, columns.index))
                build.store(pixel, kernel.at(index, count))  # overwritten by the next one, if it is inactive
                columns.following = [build.add(count, build.zext(active, kernel.index_type))]
            build.store(outside, kernel.at(rank, line, width))
            lines.following = columns.values
        with kernel.loop(wide) as columns:
            build.store(outside, kernel.at(rank, place, build.mul(height, wide), columns.index))
        over_images.following = lines.values
    build.store(total, kernel.place("count"))
    return kernel.compiled()


@functools.cache
def table_kernel() -> Launch:
    kernel = Kernel("table", TABLE, torch.float32)
    build, narrow = kernel.build, kernel.ir.IntType(32)  # a division of 64 bits takes twice as long
    places, rank, table = (kernel.pointer(name, integers=True) for name in ("places", "rank", "table"))
    index = build.inttoptr(kernel.field("index"), kernel.index_type.as_pointer())
    taps, pixels, plane = map(kernel.field, ("taps", "pixels", "plane"))
    with kernel.loop(kernel.field("sites")) as over_sites:
        site = build.load(kernel.at(index, over_sites.index))
        image = build.zext(build.udiv(build.trunc(site, narrow), build.trunc(pixels, narrow)), kernel.index_type)
        reads = kernel.at(places, build.mul(build.sub(site, build.mul(image, pixels)), taps))
        ranks = kernel.at(rank, build.mul(image, plane))
        target = kernel.at(table, build.mul(over_sites.index, taps))
        with kernel.loop(taps) as over_taps:
            place = build.sext(build.load(kernel.at(reads, over_taps.index)), kernel.index_type)
            build.store(build.load(kernel.at(ranks, place)), kernel.at(target, over_taps.index))
    return kernel.compiled()


@functools.cache
def any_of_kernel() -> Launch:
    kernel = Kernel("any_of", ANY_OF, torch.float32)
    build, byte = kernel.build, kernel.ir.IntType(8)
    mask, result = (build.inttoptr(kernel.field(name), byte.as_pointer()) for name in ("mask", "result"))
    lines, columns = (kernel.pointer(name, integers=True) for name in ("lines", "columns"))
    height, width, out_height, out_width = map(kernel.field, ("height", "width", "out_height", "out_width"))

    def bounds(cells: Any, cell: Any) -> tuple[Any, Any]:
        """The first of a cell's lines or columns, and how many there are."""
        pair = kernel.at(cells, build.mul(cell, kernel.integer(2)))
        first, behind = (build.sext(build.load(kernel.at(pair, each)), kernel.index_type) for each in range(2))
        return first, build.sub(behind, first)

    with kernel.loop(kernel.field("images")) as images, kernel.loop(out_height) as out_lines:
        first_line, line_count = bounds(lines, out_lines.index)
        start = build.mul(build.add(build.mul(images.index, height), first_line), width)
        target = build.mul(build.add(build.mul(images.index, out_height), out_lines.index), out_width)
        with kernel.loop(out_width) as out_columns:
            first, count = bounds(columns, out_columns.index)
            corner = kernel.at(mask, start, first)
            with kernel.loop(line_count, [kernel.ir.Constant(byte, 0), corner]) as over_lines:
                found, line = over_lines.values
                with kernel.loop(count, [found]) as over_columns:
                    active = build.load(kernel.at(line, over_columns.index))
                    over_columns.following = [build.or_(over_columns.values[0], active)]
                over_lines.following = [over_columns.values[0], kernel.at(line, width)]
            build.store(over_lines.values[0], kernel.at(result, target, out_columns.index))
    return kernel.compiled()
