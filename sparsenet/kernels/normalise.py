"""The kernel that puts a normalised image on the canvas of a batch, in channels-last memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsenet.kernels.machine import Kernel, Launch, bits

# Channels up to which it is used: that of pictures with one more.
MOST_CHANNELS = 4

# Lines of a piece of work.
PIECE = 16


def normalise(image: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...], canvas: Tensor) -> None:
    """Write (image - mean) / deviation, with PyTorch's rounding, to the upper left corner of a canvas.

    Args:
        image: float32 or float64 (C, H, W), of any strides.
        mean, deviation: of each channel.
        canvas: (H or more, W or more, C) of the same type, each line contiguous.
    """
    channels, height, width = image.shape
    pieces = -(-height // PIECE)
    numbers = [*map(bits, mean), *map(bits, deviation)]
    sizes = (height, width, *image.stride(), canvas.stride(0))
    threads = torch.get_num_threads() if pieces > 1 else 1
    _normalise(channels, image.dtype)((image.data_ptr(), canvas.data_ptr(), *numbers, *sizes, pieces, 0), threads)


@functools.cache
def _normalise(channels: int, dtype: torch.dtype) -> Launch:
    means, deviations = ([f"{name}_{place}" for place in range(channels)] for name in ("mean", "deviation"))
    sizes = ("height", "width", "plane", "line", "column", "canvas_line", "pieces", "taken")
    fields = ("image", "canvas", *means, *deviations, *sizes)
    kernel = Kernel(f"normalise_{channels}_{dtype.itemsize}", fields, dtype)
    build = kernel.build
    image, canvas = kernel.pointer("image"), kernel.pointer("canvas")
    height, width, plane, line, column, canvas_line, pieces = map(kernel.field, sizes[:-1])
    first_lane = kernel.ir.Constant(kernel.ir.IntType(32), 0)
    numbers = [build.extract_element(kernel.number(name), first_lane) for name in (*means, *deviations)]
    with kernel.pieces(pieces) as piece:
        first = build.mul(piece, kernel.integer(PIECE))
        with kernel.loop(kernel.smaller(build.sub(height, first), kernel.integer(PIECE))) as lines:
            place = build.add(first, lines.index)
            source = kernel.at(image, build.mul(place, line))
            target = kernel.at(canvas, build.mul(place, canvas_line))
            with kernel.loop(width) as columns:
                read = kernel.at(source, build.mul(columns.index, column))
                written = kernel.at(target, build.mul(columns.index, kernel.integer(channels)))
                for channel in range(channels):
                    number = build.load(kernel.at(read, build.mul(plane, kernel.integer(channel))))
                    number = build.fdiv(build.fsub(number, numbers[channel]), numbers[channels + channel])
                    build.store(number, kernel.at(written, channel))
    return kernel.compiled()
