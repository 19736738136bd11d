"""Of predicted saliency: the masks and logits of all octaves. Maps are small, and of one channel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsenet.kernels.activations import ACTIVATIONS
from sparsenet.kernels.machine import Kernel, Launch, bits, lanes


def octaves(
    logits: Tensor, threshold: float, convolutions: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of all octaves, float32 (N, 1, H, W), the given ones first, each of the others a convolution of the
    sigmoid before it; and the masks, bool (N, H, W), of pixels whose sigmoid is above a threshold.

    Args:
        logits: contiguous.
        convolutions: weight and bias of each, (1, 1, 3, 3) and (1,), contiguous: 3x3, with a stride of 2 and 1 pixel
            of padding.
    """
    batch, _, height, width = logits.shape
    grids = [(height, width)]
    for _ in convolutions:
        grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
    pixels = [batch * height * width for height, width in grids]
    # In the same memory: to make each by itself takes longer than to compute it.
    memory, plane = logits.new_empty(sum(pixels[1:])), logits.new_empty(height + 2, width + 2)
    flags = torch.empty(sum(pixels) + lanes(torch.float32), dtype=torch.bool)  # whole vectors are written
    found, masks, start, flag = [logits], [], 0, 0
    for place, ((height, width), count) in enumerate(zip(grids, pixels, strict=True)):
        following, parts = (0, 0), (0, 0, 0)
        if place < len(convolutions):
            following, (weight, bias) = grids[place + 1], convolutions[place]
            strides = (following[0] * following[1], following[0] * following[1], following[1], 1)
            found.append(memory.as_strided((batch, 1, *following), strides, start))
            start += pixels[place + 1]
            parts = found[-1].data_ptr(), weight.data_ptr(), bias.data_ptr()
        masks.append(flags.as_strided((batch, height, width), (height * width, width, 1), flag))
        addresses = found[place].data_ptr(), masks[-1].data_ptr(), plane.data_ptr(), *parts
        _octave()((*addresses, bits(threshold), batch, height, width, *following), 1)
        flag += count
    return found, masks


@functools.cache
def _octave() -> Launch:
    fields = ("logits", "mask", "plane", "following", "weight", "bias", "threshold", "images")
    kernel = Kernel("octave", (*fields, "height", "width", "out_height", "out_width"), torch.float32)
    build, ir = kernel.build, kernel.ir
    logits, plane, following, weight, bias = map(kernel.pointer, ("logits", "plane", "following", "weight", "bias"))
    mask, threshold = build.inttoptr(kernel.field("mask"), ir.IntType(8).as_pointer()), kernel.number("threshold")
    height, width, out_height, out_width = map(kernel.field, ("height", "width", "out_height", "out_width"))
    flags = ir.VectorType(ir.IntType(8), kernel.lanes)
    wide = build.add(width, kernel.integer(2))
    with kernel.loop(build.mul(build.add(height, kernel.integer(2)), wide)) as places:
        build.store(kernel.ir.Constant(kernel.scalar, 0.0), kernel.at(plane, places.index))

    with kernel.loop(kernel.field("images")) as images:
        image = build.mul(images.index, build.mul(height, width))
        with kernel.loop(height) as lines:
            line = build.add(image, build.mul(lines.index, width))
            inner = build.add(build.mul(build.add(lines.index, kernel.integer(1)), wide), kernel.integer(1))
            with kernel.loop(width, step=kernel.lanes) as columns:
                pixel, inside = build.add(line, columns.index), kernel.first_lanes(build.sub(width, columns.index))
                value = ACTIVATIONS["sigmoid"](kernel, kernel.load(kernel.at(logits, pixel), inside), None, None)
                kernel.store(value, kernel.at(plane, inner, columns.index), inside)
                active = build.zext(build.fcmp_ordered(">", value, threshold), flags)
                build.store(active, build.bitcast(kernel.at(mask, pixel), flags.as_pointer()), align=1)
        place = build.mul(images.index, build.mul(out_height, out_width))
        with kernel.loop(out_height) as lines, kernel.loop(out_width) as columns:
            corner = build.mul(lines.index, build.mul(wide, kernel.integer(2)))
            corner = kernel.at(plane, corner, build.mul(columns.index, kernel.integer(2)))
            total = build.load(bias)
            for tap in range(9):
                read = build.load(kernel.at(corner, build.mul(wide, kernel.integer(tap // 3)), tap % 3))
                total = build.fadd(total, build.fmul(read, build.load(kernel.at(weight, tap))))
            build.store(total, kernel.at(following, place, build.mul(lines.index, out_width), columns.index))
    return kernel.compiled()
