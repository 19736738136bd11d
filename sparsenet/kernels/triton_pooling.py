"""Pooling of rows in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsenet.kernels import triton_convolution
from sparsenet.kernels.triton_tuning import bucket, tuned, within


@tuned(
    [
        triton.Config({"BLOCK_SITES": sites, "BLOCK_CHANNELS": channels}, num_warps=4)
        for sites, channels in [(16, 128), (32, 64), (8, 256), (64, 32), (64, 16)]
    ],
    key=["size", "channels", "TAPS"],
    fits=lambda BLOCK_SITES, BLOCK_CHANNELS, arguments: within(BLOCK_CHANNELS, arguments["channels"]),
    interpreted={"BLOCK_SITES": 256, "BLOCK_CHANNELS": 32},
)
@triton.jit(do_not_specialize=["sites", "each", "inputs", "size"])
def pooled(
    rows,
    table,
    out,
    sites,
    each,
    inputs,
    channels,
    row_stride,
    size,
    TAPS: tl.constexpr,
    MAXIMUM: tl.constexpr,
    OUTSIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_SITES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    ACCUMULATOR: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    site = tl.program_id(0) * BLOCK_SITES + tl.arange(0, BLOCK_SITES)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    present, given = site < sites, channel < channels
    reads = (site % each).to(OFFSET) * TAPS
    image = site // each * inputs
    none = tl.zeros((BLOCK_SITES, BLOCK_CHANNELS), dtype=ACCUMULATOR)
    result = tl.full((BLOCK_SITES, BLOCK_CHANNELS), float("-inf") if MAXIMUM else 0.0, ACCUMULATOR)
    beyond = tl.full((BLOCK_SITES, BLOCK_CHANNELS), OUTSIDE, ACCUMULATOR)
    for tap in range(TAPS):
        row = tl.load(table + reads + tap, mask=present, other=inputs)
        filled = (row < inputs)[:, None] & given[None, :]
        places = (row + image)[:, None].to(OFFSET) * row_stride + channel[None, :]
        read = tl.load(rows + places, mask=filled, other=0.0).to(ACCUMULATOR)
        if MAXIMUM:
            read = tl.where((row > inputs)[:, None], beyond, tl.where(filled, read, none))
            result = tl.maximum(result, read, propagate_nan=tl.PropagateNan.ALL)
        else:
            result += read
    places = site[:, None].to(OFFSET) * channels + channel[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=present[:, None] & given[None, :])


def pool(operation: str, rows: Tensor, table: Tensor, inputs: int, outside: float, out: Tensor) -> None:
    """The "max" or "sum" over taps of rows (images * inputs, C), to `out` (n_out, C).

    Args:
        rows: of channels next to one another, at any distance.
        table: int32 (n_out / images, taps) as in `sparsenet.sites.KernelMap`, contiguous.
        outside: what a place outside the image holds, of which "max" makes use.
    """
    sites, channels = out.shape
    if sites == 0 or channels == 0:
        return
    wide = max(rows.stride(0) * len(rows), out.numel(), table.numel()) >= triton_convolution.WIDE

    def blocks(chosen: dict[str, int]) -> tuple[int, ...]:
        return triton.cdiv(sites, chosen["BLOCK_SITES"]), triton.cdiv(channels, chosen["BLOCK_CHANNELS"])

    with torch.cuda.device_of(rows):
        pooled[blocks](
            rows,
            table,
            out,
            sites,
            len(table),
            inputs,
            channels,
            rows.stride(0),
            bucket(sites),
            TAPS=table.shape[1],
            MAXIMUM=operation == "max",
            OUTSIDE=outside,
            OFFSET=tl.int64 if wide else tl.int32,
        )
