"""What squeeze-and-excitation asks beside convolutions: the mean of each channel over rows, and weights that take a
number for each channel along."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsenet.kernels.machine import Kernel, Launch, bits
from sparsenet.kernels.queue import Job

# Rows whose sum is added to that of the others at once: a sum of all one after the other is less exact.
BLOCK = 64

# Vectors of channels in a piece of a mean.
VECTORS = 2

# Numbers up to which one thread takes all.
ALONE = 1 << 15


def mean(rows: Tensor, pixels: int, out: Tensor) -> Job:
    """The sums of rows (n, C), contiguous, by the number of pixels, to `out`, (C,)."""
    count, channels = rows.shape
    numbers = [rows.data_ptr(), out.data_ptr(), count, channels, bits(1 / pixels), 0]
    return Job(_mean(rows.dtype), numbers, _threads(rows), rows, out)


def gated(weights: Tensor, gate: Tensor, out: Tensor) -> Job:
    """Weights (…, C, width) of whole vectors, by a number for each channel, to `out`; all contiguous."""
    channels, width = weights.shape[-2:]
    parts = weights.shape[:-2].numel()
    numbers = [weights.data_ptr(), gate.data_ptr(), out.data_ptr(), parts, channels, 0]
    return Job(_gated(width, weights.dtype), numbers, _threads(weights), weights, gate, out)


def _threads(numbers: Tensor) -> int:
    return 1 if numbers.numel() <= ALONE else torch.get_num_threads()


@functools.cache
def _mean(dtype: torch.dtype) -> Launch:
    kernel = Kernel(f"mean_{dtype.itemsize}", ("rows", "out", "count", "channels", "factor", "taken"), dtype)
    build, width = kernel.build, kernel.integer(VECTORS * kernel.lanes)
    rows, out = map(kernel.pointer, ("rows", "out"))
    count, channels = map(kernel.field, ("count", "channels"))
    factor, block = kernel.number("factor"), kernel.integer(BLOCK)

    with kernel.pieces(kernel.parts(channels, width)) as piece:
        places = [build.add(build.mul(piece, width), kernel.integer(each * kernel.lanes)) for each in range(VECTORS)]
        masks = [kernel.first_lanes(build.sub(channels, place)) for place in places]
        with kernel.loop(kernel.parts(count, block), [kernel.zero] * VECTORS) as over_blocks:
            start = build.mul(over_blocks.index, block)
            length = kernel.smaller(build.sub(count, start), block)
            with kernel.loop(length, [kernel.zero] * VECTORS) as over_rows:
                row = kernel.at(rows, build.mul(build.add(start, over_rows.index), channels))
                read = [kernel.load(kernel.at(row, place), mask) for place, mask in zip(places, masks, strict=True)]
                over_rows.following = list(map(build.fadd, over_rows.values, read))
            over_blocks.following = list(map(build.fadd, over_blocks.values, over_rows.values))
        for place, mask, total in zip(places, masks, over_blocks.values, strict=True):
            kernel.store(build.fmul(total, factor), kernel.at(out, place), mask)
    return kernel.compiled()


@functools.cache
def _gated(width: int, dtype: torch.dtype) -> Launch:
    kernel = Kernel(f"gated_{width}_{dtype.itemsize}", ("weights", "gate", "out", "parts", "channels", "taken"), dtype)
    build = kernel.build
    weights, gate, out = map(kernel.pointer, ("weights", "gate", "out"))
    channels = kernel.field("channels")
    with kernel.pieces(kernel.field("parts")) as part, kernel.loop(channels) as over_channels:
        factor = kernel.splat(build.load(kernel.at(gate, over_channels.index)))
        first = build.mul(build.add(build.mul(part, channels), over_channels.index), kernel.integer(width))
        for place in range(0, width, kernel.lanes):
            product = build.fmul(kernel.load(kernel.at(weights, first, kernel.integer(place))), factor)
            kernel.store(product, kernel.at(out, first, kernel.integer(place)))
    return kernel.compiled()
