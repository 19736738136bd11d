"""Kernels of index arithmetic: where the active pixels are, and which rows the taps of a window read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsenet.kernels.machine import Kernel, Launch


def sites(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The active pixels of a mask, bool (N, H, W), as `sparsenet.sites.ActiveSites` has them: `index` and `rank`."""
    batch, height, width = mask.shape
    mask = mask.contiguous()
    index = torch.empty(mask.numel(), dtype=torch.int64)
    rank = torch.empty(batch, height + 1, width + 1, dtype=torch.int32)
    job = _sites()((mask.data_ptr(), index.data_ptr(), rank.data_ptr(), batch, height, width, 0), 1)
    return index[: job[-1]], rank


def table(places: Tensor, index: Tensor, rank: Tensor) -> Tensor:
    """The row that each tap of each site reads: int32 (n_out, taps).

    Args:
        places: int32 (H_out * W_out, taps), where in one image's flattened rank image each tap reads.
        index: int64 (n_out,), the sites.
        rank: int32 (N, H + 1, W + 1).
    """
    places, index, rank = places.contiguous(), index.contiguous(), rank.contiguous()
    pixels, taps = places.shape
    result = torch.empty(len(index), taps, dtype=torch.int32)
    plane = rank.shape[1] * rank.shape[2]
    pointers = places.data_ptr(), index.data_ptr(), rank.data_ptr(), result.data_ptr()
    _table()((*pointers, len(index), taps, pixels, plane), 1)
    return result


@functools.cache
def _sites() -> Launch:
    fields = ("mask", "index", "rank", "images", "height", "width", "count")
    kernel = Kernel("sites", fields, torch.float32)
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
def _table() -> Launch:
    fields = ("places", "index", "rank", "table", "sites", "taps", "pixels", "plane")
    kernel = Kernel("table", fields, torch.float32)
    build = kernel.build
    places, rank, table = (kernel.pointer(name, integers=True) for name in ("places", "rank", "table"))
    index = build.inttoptr(kernel.field("index"), kernel.index_type.as_pointer())
    taps, pixels, plane = map(kernel.field, ("taps", "pixels", "plane"))
    with kernel.loop(kernel.field("sites")) as over_sites:
        site = build.load(kernel.at(index, over_sites.index))
        image = build.udiv(site, pixels)
        reads = kernel.at(places, build.mul(build.sub(site, build.mul(image, pixels)), taps))
        ranks = kernel.at(rank, build.mul(image, plane))
        target = kernel.at(table, build.mul(over_sites.index, taps))
        with kernel.loop(taps) as over_taps:
            place = build.sext(build.load(kernel.at(reads, over_taps.index)), kernel.index_type)
            build.store(build.load(kernel.at(ranks, place)), kernel.at(target, over_taps.index))
    return kernel.compiled()
