"""The gradient of a masked convolution's weights in Triton: for each tap, the rows that it read, transposed, times the
gradients of what it added them to.

A program takes a share of the sites, and the shares are summed in one order, so that equal runs give equal numbers.
(The gradient of the rows is a convolution by the inverse kernel map: see `sparsenet.backends.triton`.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsenet.kernels import triton_convolution
from sparsenet.kernels.triton_blocks import INTERPRETED, bound
from sparsenet.kernels.triton_support import precision
from sparsenet.kernels.triton_tuning import bucket, tuned, within

# Programs that keep a device busy, and elements of shares in memory at a time.
PROGRAMS = 512
SHARES = 1 << 24

# Sites that a share has at least.
FEWEST = 256


@tuned(
    [
        triton.Config(
            {"BLOCK_CHANNELS": channels, "BLOCK_OUTPUTS": outputs, "BLOCK_SITES": sites}, num_warps=4, num_stages=stages
        )
        for channels, outputs, sites, stages in [
            (128, 128, 32, 3),
            (64, 128, 32, 4),
            (128, 64, 32, 4),
            (64, 64, 64, 3),
            (64, 64, 32, 4),
            (32, 64, 64, 3),
            (64, 32, 64, 3),
            (32, 32, 32, 3),
            (16, 16, 32, 2),
        ]
    ],
    key=["size", "channels", "outputs", "PRECISION"],
    fits=lambda BLOCK_CHANNELS, BLOCK_OUTPUTS, BLOCK_SITES, arguments: (
        within(BLOCK_CHANNELS, arguments["channels"])
        and within(BLOCK_OUTPUTS, arguments["outputs"])
        and (arguments["rows"].element_size() < 8 or max(BLOCK_CHANNELS, BLOCK_OUTPUTS) <= 64)
    ),
    interpreted={"BLOCK_CHANNELS": 16, "BLOCK_OUTPUTS": 16, "BLOCK_SITES": 256},
)
@triton.jit(do_not_specialize=["sites", "inputs", "share", "size"])
def product(
    rows,
    table,
    grad,
    shares,
    sites,
    inputs,
    channels,
    outputs,
    groups,
    taps,
    row_stride,
    share,
    size,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
):
    """rows (inputs, groups * channels) and grad (sites, groups * outputs) to shares (count, groups, taps, channels,
    outputs), each of `share` sites."""
    ACCUMULATOR: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    program, cell, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    output_blocks = tl.cdiv(outputs, BLOCK_OUTPUTS)
    channel = program // output_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    output = program % output_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    group, tap = cell // taps, cell % taps
    given, asked = channel < channels, output < outputs

    sums = tl.zeros((BLOCK_CHANNELS, BLOCK_OUTPUTS), dtype=ACCUMULATOR)
    end = tl.minimum(part * share + share, sites)
    for first in range(bound(part * share), bound(end), BLOCK_SITES):
        site = first + tl.arange(0, BLOCK_SITES)
        present = site < end
        row = tl.load(table + site.to(OFFSET) * taps + tap, mask=present, other=inputs)
        found = row < inputs
        places = row[:, None].to(OFFSET) * row_stride + group * channels + channel[None, :]
        read = tl.load(rows + places, mask=found[:, None] & given[None, :], other=0.0)
        places = site[:, None].to(OFFSET) * (groups * outputs) + group * outputs + output[None, :]
        back = tl.load(grad + places, mask=found[:, None] & asked[None, :], other=0.0)
        if INTERPRETED and rows.dtype.element_ty == tl.bfloat16:  # NumPy has none
            read, back = read.to(tl.float32), back.to(tl.float32)
        sums = tl.dot(tl.trans(read), back, sums, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    places = (part * tl.num_programs(1) + cell).to(tl.int64) * channels * outputs
    places += channel[:, None] * outputs + output[None, :]
    tl.store(shares + places, sums, mask=given[:, None] & asked[None, :])


@tuned(
    [
        triton.Config({"BLOCK_OUTPUTS": outputs, "BLOCK_SITES": sites}, num_warps=4)
        for outputs, sites in [(128, 16), (64, 32), (32, 64), (16, 64)]
    ],
    key=["size", "outputs"],
    fits=lambda BLOCK_OUTPUTS, BLOCK_SITES, arguments: within(BLOCK_OUTPUTS, arguments["outputs"]),
    interpreted={"BLOCK_OUTPUTS": 16, "BLOCK_SITES": 256},
)
@triton.jit(do_not_specialize=["sites", "inputs", "share", "size"])
def by_channel(
    rows,
    table,
    grad,
    shares,
    sites,
    inputs,
    outputs,
    multiple,
    taps,
    row_stride,
    share,
    size,
    OFFSET: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
):
    """As `product`, where each output channel reads one input channel: to shares (count, taps, outputs)."""
    ACCUMULATOR: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    tap, part = tl.program_id(1), tl.program_id(2)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    asked = output < outputs

    sums = tl.zeros((BLOCK_SITES, BLOCK_OUTPUTS), dtype=ACCUMULATOR)
    end = tl.minimum(part * share + share, sites)
    for first in range(bound(part * share), bound(end), BLOCK_SITES):
        site = first + tl.arange(0, BLOCK_SITES)
        present = site < end
        row = tl.load(table + site.to(OFFSET) * taps + tap, mask=present, other=inputs)
        filled = (row < inputs)[:, None] & asked[None, :]
        places = row[:, None].to(OFFSET) * row_stride + (output // multiple)[None, :]
        read = tl.load(rows + places, mask=filled, other=0.0)
        back = tl.load(grad + site[:, None].to(OFFSET) * outputs + output[None, :], mask=filled, other=0.0)
        sums += read.to(ACCUMULATOR) * back.to(ACCUMULATOR)

    places = (part * taps + tap).to(tl.int64) * outputs + output
    tl.store(shares + places, tl.sum(sums, 0), mask=asked)


def of_weights(rows: Tensor, grad: Tensor, table: Tensor, inputs: int, groups: int) -> Tensor:
    """The gradient of weights (groups, taps, C / groups, O / groups).

    Args:
        rows: (at least `inputs`, C), of channels next to one another.
        grad: of the result, (n_out, O), contiguous.
        table: int32 (n_out, taps).
    """
    sites, taps = table.shape
    channels, outputs = rows.shape[1] // groups, grad.shape[1] // groups
    accumulator = torch.float64 if rows.dtype is torch.float64 else torch.float32
    cells = groups * taps * channels * outputs
    tiles = groups * taps * -(-channels // 64) * -(-outputs // 64)  # about so many programs for one share
    count = max(1, min(PROGRAMS // tiles, sites // FEWEST, SHARES // cells))
    share = -(-sites // count)
    if sites == 0:
        return rows.new_zeros(groups, taps, channels, outputs)
    wide = max(rows.stride(0) * len(rows), grad.numel(), table.numel()) >= triton_convolution.WIDE
    offset = tl.int64 if wide else tl.int32
    shares = torch.empty(count, groups, taps, channels, outputs, dtype=accumulator, device=rows.device)
    if channels == 1:
        by_tap = torch.empty(count, taps, groups * outputs, dtype=accumulator, device=rows.device)

        def blocks(chosen: dict[str, int]) -> tuple[int, ...]:
            return triton.cdiv(groups * outputs, chosen["BLOCK_OUTPUTS"]), taps, count

        with torch.cuda.device_of(rows):
            by_channel[blocks](
                rows,
                table,
                grad,
                by_tap,
                sites,
                inputs,
                groups * outputs,
                outputs,
                taps,
                rows.stride(0),
                share,
                bucket(sites),
                OFFSET=offset,
            )
        return by_tap.sum(0).view(taps, groups, 1, outputs).transpose(0, 1).to(rows.dtype)

    def programs(chosen: dict[str, int]) -> tuple[int, ...]:
        blocks = triton.cdiv(channels, chosen["BLOCK_CHANNELS"]) * triton.cdiv(outputs, chosen["BLOCK_OUTPUTS"])
        return blocks, groups * taps, count

    with torch.cuda.device_of(rows):
        product[programs](
            rows,
            table,
            grad,
            shares,
            sites,
            inputs,
            channels,
            outputs,
            groups,
            taps,
            rows.stride(0),
            share,
            bucket(sites),
            PRECISION=precision(rows.dtype),
            OFFSET=offset,
        )
    return shares.sum(0).to(rows.dtype)
