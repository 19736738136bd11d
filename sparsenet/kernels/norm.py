"""Normalisation of rows, each over its channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    numbers = [*addresses, count, channels, bits(1 / channels), bits(eps), 0]
    return Job(_layer_norm(rows.dtype), numbers, _threads(rows), rows, weight, bias, out)


def unit_length(rows: Tensor, weight: Tensor, eps: float, out: Tensor) -> Job:
    """Rows (n, C) to `out`: each by its length, or by `eps` if that is more, times the weight, (C,). All are
    contiguous."""
    count, channels = rows.shape
    addresses = (each.data_ptr() for each in (rows, weight, out))
    numbers = [*addresses, count, channels, bits(eps), 0]
    return Job(_unit_length(rows.dtype), numbers, _threads(rows), rows, weight, out)


def _threads(rows: Tensor) -> int:
    return 1 if rows.numel() <= ALONE else torch.get_num_threads()


@functools.cache
def _layer_norm(dtype: torch.dtype) -> Launch:
    fields = ("rows", "weight", "bias", "out", "count", "channels", "share", "least", "taken")
    kernel = Kernel(f"layer_norm_{dtype.itemsize}", fields, dtype)
    build = kernel.build
    weight, bias, channels = kernel.pointer("weight"), kernel.pointer("bias"), kernel.field("channels")
    share, least, one = kernel.number("share"), kernel.number("least"), kernel.constant(1.0)
    with _each_row(kernel) as (row, target):
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


@functools.cache
def _unit_length(dtype: torch.dtype) -> Launch:
    fields = ("rows", "weight", "out", "count", "channels", "least", "taken")
    kernel = Kernel(f"unit_length_{dtype.itemsize}", fields, dtype)
    build, weight, channels = kernel.build, kernel.pointer("weight"), kernel.field("channels")
    with _each_row(kernel) as (row, target):
        with kernel.loop(channels, [kernel.zero], step=kernel.lanes) as squares:
            mask = kernel.first_lanes(build.sub(channels, squares.index))
            number = kernel.load(kernel.at(row, squares.index), mask)
            squares.following = [kernel.fma(number, number, squares.values[0])]
        length = kernel.root(kernel.total(squares.values[0]))
        length = kernel.clamp(length, kernel.number("least"), kernel.constant(math.inf))
        with kernel.loop(channels, step=kernel.lanes) as results:
            mask = kernel.first_lanes(build.sub(channels, results.index))
            number, factor = (kernel.load(kernel.at(pointer, results.index), mask) for pointer in (row, weight))
            number = build.fmul(build.fdiv(number, length), factor)
            kernel.store(number, kernel.at(target, results.index), mask)
    return kernel.compiled()


@contextmanager
def _each_row(kernel: Kernel) -> Iterator[tuple[Any, Any]]:
    """Code that runs for each of the job's `rows`: the address of its numbers, and of those of `out`."""
    build, rows, out = kernel.build, kernel.pointer("rows"), kernel.pointer("out")
    count, channels, length = kernel.field("count"), kernel.field("channels"), kernel.integer(PIECE)
    with kernel.pieces(kernel.parts(count, length)) as piece:
        first = build.mul(piece, length)
        with kernel.loop(kernel.smaller(build.sub(count, first), length)) as over_rows:
            place = build.mul(build.add(first, over_rows.index), channels)
            yield kernel.at(rows, place), kernel.at(out, place)
