"""Layer normalisation of rows, each over its channels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsenet.kernels.machine import Kernel, Launch, bits
from sparsenet.kernels.queue import Job

# Rows of a piece of work.
PIECE = 32

# Numbers up to which one thread takes all.
ALONE = 1 << 14


def layer_norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> Job:
    """Rows (n, C) to `out`: each less its mean, by the root of its variance and `eps`, times the weight, plus the
    bias, both (C,). All are contiguous."""
    count, channels = rows.shape
    addresses = (each.data_ptr() for each in (rows, weight, bias, out))
    threads = 1 if rows.numel() <= ALONE else torch.get_num_threads()
    numbers = [*addresses, count, channels, bits(1 / channels), bits(eps), 0]
    return Job(_layer_norm(rows.dtype), numbers, threads, rows, weight, bias, out)


@functools.cache
def _layer_norm(dtype: torch.dtype) -> Launch:
    fields = ("rows", "weight", "bias", "out", "count", "channels", "share", "least", "taken")
    kernel = Kernel(f"layer_norm_{dtype.itemsize}", fields, dtype)
    build = kernel.build
    rows, weight, bias, out = map(kernel.pointer, ("rows", "weight", "bias", "out"))
    count, channels, length = kernel.field("count"), kernel.field("channels"), kernel.integer(PIECE)
    share, least, one = kernel.number("share"), kernel.number("least"), kernel.constant(1.0)

    with kernel.pieces(kernel.parts(count, length)) as piece:
        first = build.mul(piece, length)
        with kernel.loop(kernel.smaller(build.sub(count, first), length)) as over_rows:
            place = build.mul(build.add(first, over_rows.index), channels)
            row, target = kernel.at(rows, place), kernel.at(out, place)
            with kernel.loop(channels, [kernel.zero], step=kernel.lanes) as sums:
                mask = kernel.first_lanes(build.sub(channels, sums.index))
                sums.following = [build.fadd(sums.values[0], kernel.load(kernel.at(row, sums.index), mask))]
            mean = build.fmul(kernel.total(sums.values[0]), share)
            with kernel.loop(channels, [kernel.zero], step=kernel.lanes) as squares:
                mask = kernel.first_lanes(build.sub(channels, squares.index))
                distance = build.fsub(kernel.load(kernel.at(row, squares.index), mask), mean)
                distance = build.select(mask, distance, kernel.zero)
                squares.following = [kernel.fma(distance, distance, squares.values[0])]
            variance = build.fmul(kernel.total(squares.values[0]), share)
            scale = build.fdiv(one, kernel.root(build.fadd(variance, least)))
            with kernel.loop(channels, step=kernel.lanes) as results:
                mask = kernel.first_lanes(build.sub(channels, results.index))
                number, factor, added = (
                    kernel.load(kernel.at(pointer, results.index), mask) for pointer in (row, weight, bias)
                )
                number = build.fmul(build.fsub(number, mean), scale)
                kernel.store(kernel.fma(number, factor, added), kernel.at(target, results.index), mask)
    return kernel.compiled()
