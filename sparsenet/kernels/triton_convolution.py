"""Masked convolution on rows in Triton, as one implicit matrix product.

A program computes a block of output sites times a block of output channels: over all taps and blocks of input channels
it gathers the rows that the kernel map names and multiplies them by the tap's weights, with no columns in memory, and
applies the epilogue before it writes. Where each output channel reads a single input channel, there is nothing to
multiply as matrices, and the sums are made channel by channel. (The implicit GEMM of TorchSparse++, arXiv 2311.12862,
unsorted, with a look-up table of the kernel map.)

Every access is masked, and each output is written by one program, so that equal runs give equal numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsenet.kernels.triton_activations import activated
from sparsenet.kernels.triton_blocks import INTERPRETED, bound
from sparsenet.kernels.triton_support import precision
from sparsenet.kernels.triton_tuning import bucket, tuned, within

# Elements from which offsets need 64 bits.
WIDE = 1 << 31


def _configs(*shapes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Of blocks of sites, outputs and channels, warps and stages: of five stages, two are of rows on their way, because
    where they are comes of the table's, which are on their way before."""
    return [
        triton.Config(
            {"BLOCK_SITES": sites, "BLOCK_OUTPUTS": outputs, "BLOCK_CHANNELS": channels, "TOGETHER": 8},
            num_warps=warps,
            num_stages=stages,
        )
        for sites, outputs, channels, warps, stages in shapes
    ]


def _product_fits(
    BLOCK_SITES: int, BLOCK_OUTPUTS: int, BLOCK_CHANNELS: int, TOGETHER: int, arguments: dict[str, object]
) -> bool:
    rows, sites, outputs, channels = (arguments[name] for name in ("rows", "sites", "outputs", "channels"))
    assert isinstance(rows, Tensor) and isinstance(sites, int)
    assert isinstance(outputs, int) and isinstance(channels, int)
    # 128 bytes of channels are what tensor cores take at once.
    width = max(16, min(128 // rows.element_size(), triton.next_power_of_2(channels)))
    narrow = rows.element_size() < 8 or BLOCK_OUTPUTS <= 64
    return narrow and width == BLOCK_CHANNELS and within(BLOCK_SITES, sites, 32) and within(BLOCK_OUTPUTS, outputs)


@tuned(
    _configs(
        (128, 256, 64, 8, 5),
        (256, 128, 64, 8, 5),
        (128, 128, 64, 8, 5),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 5),
        (64, 128, 64, 4, 7),
        (128, 64, 64, 4, 7),
        (64, 64, 64, 4, 7),
        (64, 64, 64, 4, 3),
        (32, 64, 64, 4, 5),
        (128, 32, 64, 4, 5),
        (128, 128, 32, 8, 7),
        (128, 128, 32, 8, 3),
        (64, 128, 32, 4, 7),
        (128, 64, 32, 4, 7),
        (64, 64, 32, 4, 7),
        (64, 64, 32, 4, 3),
        (128, 32, 32, 4, 5),
        (64, 128, 16, 4, 5),
        (64, 64, 16, 4, 5),
        (64, 32, 16, 4, 3),
        (64, 16, 16, 4, 3),
        (32, 16, 16, 2, 2),
    ),
    key=["size", "channels", "outputs", "TAPS", "PRECISION"],
    fits=_product_fits,
    interpreted={"BLOCK_SITES": 256, "BLOCK_OUTPUTS": 16, "BLOCK_CHANNELS": 16, "TOGETHER": 2},
)
@triton.heuristics(
    {
        "WHOLE": lambda given: (
            given["channels"] % given["BLOCK_CHANNELS"] == 0 and given["outputs"] % given["BLOCK_OUTPUTS"] == 0
        )
    }
)
@triton.jit(do_not_specialize=["sites", "each", "inputs", "size"])
def product(
    rows,
    table,
    weights,
    scale,
    shift,
    residual,
    out,
    sites,
    each,
    inputs,
    channels,
    outputs,
    groups,
    row_stride,
    group_stride,
    tap_stride,
    channel_stride,
    output_stride,
    size,
    TAPS: tl.constexpr,
    ORDER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """rows (images * inputs, groups * channels) to out (sites, groups * outputs), by weights that lie by group, tap,
    channel and output as the strides say.

    Args:
        table: int32 (each, TAPS) as in `sparsenet.sites.KernelMap`, for each of sites / each images that follow one
            another; `None` where each row reads itself alone.
        size: by which it is tuned.
        OFFSET: the integers that count elements.
    """
    ACCUMULATOR: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    # Programs that run together share rows and weights: some blocks of sites by all blocks of outputs.
    program, group = tl.program_id(0), tl.program_id(1)
    site_blocks, output_blocks = tl.cdiv(sites, BLOCK_SITES), tl.cdiv(outputs, BLOCK_OUTPUTS)
    first_block = program // (TOGETHER * output_blocks) * TOGETHER
    beside = tl.minimum(site_blocks - first_block, TOGETHER)
    within_them = program % (TOGETHER * output_blocks)
    site = (first_block + within_them % beside) * BLOCK_SITES + tl.arange(0, BLOCK_SITES)
    output = within_them // beside * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    present, asked = site < sites, output < outputs
    reads = (site % each).to(OFFSET) * TAPS
    image = site // each * inputs
    part = tl.arange(0, BLOCK_CHANNELS)
    columns = rows + group * channels + part[None, :]
    filters = weights + group * group_stride + part[:, None] * channel_stride + output[None, :] * output_stride

    sums = tl.zeros((BLOCK_SITES, BLOCK_OUTPUTS), dtype=ACCUMULATOR)
    for step in range(bound(TAPS * tl.cdiv(channels, BLOCK_CHANNELS))):
        tap = step % TAPS
        first = step // TAPS * BLOCK_CHANNELS
        if table is None:
            row, found = site, present
        else:
            row = tl.load(table + reads + tap, mask=present, other=inputs)
            found = row < inputs
            row += image
        left = part < channels - first
        filled = found[:, None] if WHOLE else found[:, None] & left[None, :]
        known = None if WHOLE else left[:, None] & asked[None, :]
        read = tl.load(columns + (row.to(OFFSET) * row_stride + first)[:, None], mask=filled, other=0.0)
        weight = tl.load(
            filters + (tap * tap_stride + first * channel_stride), mask=known, other=None if WHOLE else 0.0
        )
        if INTERPRETED and rows.dtype.element_ty == tl.bfloat16:  # NumPy has none
            read, weight = read.to(tl.float32), weight.to(tl.float32)
        sums = tl.dot(read, weight, sums, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    number, all_outputs = group * outputs + output, groups * outputs
    places = site[:, None].to(OFFSET) * all_outputs + number[None, :]
    valid = present[:, None] & asked[None, :]
    sums = finished(sums, scale, shift, residual, number, asked, places, valid, ORDER, ACTIVATION, LOW, HIGH)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=valid)


@tuned(
    [
        triton.Config({"BLOCK_SITES": sites, "BLOCK_OUTPUTS": outputs}, num_warps=warps)
        for sites, outputs, warps in [(16, 128, 4), (32, 64, 4), (8, 256, 4), (64, 32, 4), (32, 128, 8), (64, 16, 4)]
    ],
    key=["size", "outputs", "TAPS"],
    fits=lambda BLOCK_SITES, BLOCK_OUTPUTS, arguments: within(BLOCK_OUTPUTS, arguments["outputs"]),
    interpreted={"BLOCK_SITES": 256, "BLOCK_OUTPUTS": 16},
)
@triton.jit(do_not_specialize=["sites", "each", "inputs", "size"])
def by_channel(
    rows,
    table,
    weights,
    scale,
    shift,
    residual,
    out,
    sites,
    each,
    inputs,
    outputs,
    multiple,
    row_stride,
    tap_stride,
    output_stride,
    size,
    TAPS: tl.constexpr,
    ORDER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """As `product`, where each output channel reads one input channel, and `multiple` outputs in a row the same."""
    ACCUMULATOR: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    site = tl.program_id(0) * BLOCK_SITES + tl.arange(0, BLOCK_SITES)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    present, asked = site < sites, output < outputs
    reads = (site % each).to(OFFSET) * TAPS
    image = site // each * inputs
    channel = output // multiple

    sums = tl.zeros((BLOCK_SITES, BLOCK_OUTPUTS), dtype=ACCUMULATOR)
    for tap in range(TAPS):
        if table is None:
            row, found = site, present
        else:
            row = tl.load(table + reads + tap, mask=present, other=inputs)
            found = row < inputs
            row += image
        filled = found[:, None] & asked[None, :]
        read = tl.load(rows + row[:, None].to(OFFSET) * row_stride + channel[None, :], mask=filled, other=0.0)
        weight = tl.load(weights + tap * tap_stride + output * output_stride, mask=asked, other=0.0)
        sums += read.to(ACCUMULATOR) * weight.to(ACCUMULATOR)[None, :]

    places = site[:, None].to(OFFSET) * outputs + output[None, :]
    valid = present[:, None] & asked[None, :]
    sums = finished(sums, scale, shift, residual, output, asked, places, valid, ORDER, ACTIVATION, LOW, HIGH)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=valid)


@triton.jit
def finished(
    sums,
    scale,
    shift,
    residual,
    number,
    asked,
    places,
    valid,
    ORDER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """The outputs of a block's sums: see `sparsenet.backends.epilogue.Epilogue`."""
    if scale is not None:
        sums *= tl.load(scale + number, mask=asked, other=1.0).to(sums.dtype)[None, :]
    if shift is not None:
        sums += tl.load(shift + number, mask=asked, other=0.0).to(sums.dtype)[None, :]
    if residual is not None and ORDER == "before":
        sums += tl.load(residual + places, mask=valid, other=0.0).to(sums.dtype)
    sums = activated(sums, ACTIVATION, LOW, HIGH)
    if residual is not None and ORDER == "after":
        sums += tl.load(residual + places, mask=valid, other=0.0).to(sums.dtype)
    return sums


def convolve(
    rows: Tensor,
    weights: Tensor,
    out: Tensor,
    table: Tensor | None,
    inputs: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    order: str = "before",
    activation: str = "clamp",
    low: float = float("-inf"),
    high: float = float("inf"),
) -> None:
    """Rows (images * inputs, C) to `out` (n_out, O).

    Args:
        rows: of channels next to one another, at any distance.
        weights: (groups, taps, C / groups, O / groups), of any strides.
        out: contiguous, as `residual` and the table are.
        table: int32 (n_out / images, taps) as in `sparsenet.sites.KernelMap`; `None` where each row reads itself.
        scale, shift, ...: the fields of `sparsenet.backends.epilogue.Epilogue`.
    """
    groups, taps, channels, outputs = weights.shape
    sites = len(out)
    if sites == 0:
        return
    wide = max(rows.stride(0) * len(rows), out.numel(), 0 if table is None else table.numel()) >= WIDE
    offset = tl.int64 if wide else tl.int32
    each = sites if table is None else len(table)
    operands, counts = (scale, shift, residual, out), (sites, each, inputs)
    steps = {"ORDER": order, "ACTIVATION": activation, "LOW": low, "HIGH": high, "OFFSET": offset, "TAPS": taps}
    if channels == 1:

        def blocks(chosen: dict[str, int]) -> tuple[int, ...]:
            return triton.cdiv(sites, chosen["BLOCK_SITES"]), triton.cdiv(groups * outputs, chosen["BLOCK_OUTPUTS"])

        flat = weights.permute(1, 2, 0, 3).reshape(taps, groups * outputs)
        with torch.cuda.device_of(rows):
            layout = groups * outputs, outputs, rows.stride(0), *flat.stride()
            by_channel[blocks](rows, table, flat, *operands, *counts, *layout, bucket(sites), **steps)
        return

    def programs(chosen: dict[str, int]) -> tuple[int, ...]:
        blocks = triton.cdiv(sites, chosen["BLOCK_SITES"]) * triton.cdiv(outputs, chosen["BLOCK_OUTPUTS"])
        return blocks, groups

    with torch.cuda.device_of(rows):
        layout = channels, outputs, groups, rows.stride(0), *weights.stride()
        steps["PRECISION"] = precision(rows.dtype)
        product[programs](rows, table, weights, *operands, *counts, *layout, bucket(sites), **steps)
