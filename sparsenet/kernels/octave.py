"""Of predicted saliency: its mask, and the logits of the next octave, at once. Maps are small, and of one channel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsenet.kernels.activations import ACTIVATIONS
from sparsenet.kernels.machine import Kernel, Launch, bits, lanes
from sparsenet.kernels.queue import Job


def octave(
    logits: Tensor, threshold: float, following: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Job]:
    """The mask, bool (N, H, W), of pixels whose sigmoid is above a threshold, and what writes it, and to `following` a
    3x3 convolution of these, with a stride of 2 and 1 pixel of padding.

    Args:
        logits, following: float32 (N, 1, H, W), contiguous; `following` is `None` where there is no other octave.
        weight, bias: of the convolution, (1, 1, 3, 3) and (1,), contiguous.
    """
    batch, _, height, width = logits.shape
    pixels = batch * height * width
    mask = torch.empty(pixels + lanes(torch.float32), dtype=torch.bool)  # where whole vectors are written
    plane = torch.zeros(height + 2, width + 2)
    parts = (logits, mask, plane, following, weight, bias)
    addresses = (0 if part is None else part.data_ptr() for part in parts)
    out = (0, 0) if following is None else following.shape[2:]
    numbers = [*addresses, bits(threshold), batch, height, width, *out]
    return mask[:pixels].view(batch, height, width), Job(_octave(), numbers, 1, *parts)


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
