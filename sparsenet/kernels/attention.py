"""Attention of pixels to few keys, as the non-local block of a Selective Module has it, of few channels.

A vector holds as many queries, one in each lane, so that none is idle however few the channels are; keys and values are
read number by number. (1444 queries, 361 keys, 8 channels: 0.14 ms on two threads, and 0.51 by PyTorch.)
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sparsenet.kernels.activations import exp
from sparsenet.kernels.machine import Kernel, Launch
from sparsenet.kernels.queue import Job

# Channels up to which it is used: a query's, and the sums of its values, are in registers or near.
MOST_CHANNELS = 64

# Keys up to which it is used: their weights, of as many queries as a vector holds, stay in a core's first cache.
MOST_KEYS = 400


def attend(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> Job:
    """softmax(queries · keysᵀ / √C) · values, of rows (n, C) and twice (m, C), to `out`, rows (n, C).

    All are float32, and contiguous but for what lies between two rows, which is as much in keys as in values. There are
    `MOST_KEYS` keys at most.
    """
    count, channels = queries.shape
    assert 0 < len(keys) <= MOST_KEYS
    addresses = (each.data_ptr() for each in (queries, keys, values, out))
    numbers = [*addresses, count, len(keys), queries.stride(0), keys.stride(0), out.stride(0), 0]
    return Job(_attend(channels), numbers, torch.get_num_threads(), queries, keys, values, out)


@functools.cache
def _attend(channels: int) -> Launch:
    fields = ("queries", "keys", "values", "out", "count", "keys_count", "query_stride", "key_stride", "out_stride")
    kernel = Kernel(f"attend_{channels}", (*fields, "taken"), torch.float32)
    build, lanes, number = kernel.build, range(kernel.lanes), kernel.ir.IntType(32)
    queries, keys, values, out = map(kernel.pointer, fields[:4])
    count, keys_count, query_stride, key_stride, out_stride = map(kernel.field, fields[4:])
    last = build.sub(count, kernel.integer(1))
    weights = build.alloca(kernel.scalar, MOST_KEYS * kernel.lanes)

    with kernel.pieces(kernel.parts(count, kernel.integer(kernel.lanes))) as piece:
        first = build.mul(piece, kernel.integer(kernel.lanes))
        # Beyond the last query, the last one is computed again.
        places = [kernel.smaller(build.add(first, kernel.integer(lane)), last) for lane in lanes]
        reads = [kernel.at(queries, build.mul(place, query_stride)) for place in places]
        scaled = []
        for channel in range(channels):
            vector = kernel.zero
            for lane, read in enumerate(reads):
                found = build.load(kernel.at(read, channel))
                vector = build.insert_element(vector, found, kernel.ir.Constant(number, lane))
            scaled.append(build.fmul(vector, kernel.constant(1 / math.sqrt(channels))))

        # In three loops, none of which waits for what it has just begun: in one they would take twice as long.
        with kernel.loop(keys_count, [kernel.constant(-math.inf)]) as highest:
            row, score = kernel.at(keys, build.mul(highest.index, key_stride)), kernel.zero
            for channel, vector in enumerate(scaled):
                score = kernel.fma(vector, kernel.splat(build.load(kernel.at(row, channel))), score)
            kernel.store(score, kernel.at(weights, build.mul(highest.index, kernel.integer(kernel.lanes))))
            larger = build.fcmp_ordered(">", score, highest.values[0])
            highest.following = [build.select(larger, score, highest.values[0])]
        with kernel.loop(keys_count, [kernel.zero]) as total:
            place = kernel.at(weights, build.mul(total.index, kernel.integer(kernel.lanes)))
            weight = exp(kernel, build.fsub(kernel.load(place), highest.values[0]))
            kernel.store(weight, place)
            total.following = [build.fadd(total.values[0], weight)]
        with kernel.loop(keys_count, [kernel.zero] * channels) as sums:
            weight = kernel.load(kernel.at(weights, build.mul(sums.index, kernel.integer(kernel.lanes))))
            row = kernel.at(values, build.mul(sums.index, key_stride))
            read = [kernel.splat(build.load(kernel.at(row, channel))) for channel in range(channels)]
            sums.following = [kernel.fma(weight, *pair) for pair in zip(read, sums.values, strict=True)]
        share = build.fdiv(kernel.constant(1.0), total.values[0])
        for channel, product in enumerate(sums.values):
            mean = build.fmul(product, share)
            for lane, place in enumerate(places):
                target = kernel.at(out, build.mul(place, out_stride), channel)
                build.store(build.extract_element(mean, kernel.ir.Constant(number, lane)), target)
    return kernel.compiled()
