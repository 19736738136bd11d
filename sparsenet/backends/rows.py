"""Gather rows by the kernel map, then one matrix product; trainable, any groups, any device.

The gathered columns (taps times the size of the rows) are never kept: they are made chunk by chunk, and made
again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsenet.sites import KernelMap

# Elements of gathered columns at a time: 8 MiB of float32 stay in the last-level cache
# (75x75x256 at density 1 on 2 cores: 25 % faster than one product over all rows).
CHUNK = 1 << 21


def unsupported(weight: Tensor, groups: int) -> str | None:
    return None


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, kernel_map: KernelMap | None) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    outputs = len(weight)
    # In the order in which columns are gathered. Of a channels-last weight this is a view: no copy in any pass.
    packed = weight.permute(0, 2, 3, 1).reshape(groups, outputs // groups, -1)
    if kernel_map is None:
        return _product(rows[:, None], packed, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, packed, bias)):
        return _GatherProduct.apply(rows, packed, bias, kernel_map)
    return _gather_product(rows, packed, bias, kernel_map)


def _split(columns: Tensor, groups: int) -> Tensor:
    """Columns (n, taps, C) by group: (groups, n, taps * C / groups)."""
    sites, taps, channels = columns.shape
    grouped = columns.view(sites, taps, groups, channels // groups).permute(2, 0, 1, 3)
    return grouped.reshape(groups, sites, taps * channels // groups)


def _product(columns: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Columns (n, taps, C) times packed weights (groups, O / groups, taps * I): rows (n, O)."""
    groups = len(packed)
    if groups == 1:
        return F.linear(columns.flatten(1), packed[0], bias)
    out = (_split(columns, groups) @ packed.mT).transpose(0, 1).flatten(1)
    return out if bias is None else out + bias


def _gather_product(rows: Tensor, packed: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    groups, outputs, _ = packed.shape
    if (
        groups == 1
        and outputs <= rows.shape[1]
        and kernel_map.inputs <= len(kernel_map.table)
        and rows.dtype in (torch.float32, torch.float64)  # sums of halves would round each summand
        and rows.device.type == "cpu"
    ):
        return _product_gather(rows, packed[0], bias, kernel_map)
    parts = [_product(columns, packed, bias) for _, _, columns in _chunks(rows, kernel_map)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product_gather(rows: Tensor, packed: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """The other way round: every row times every tap's weights (O, taps * C), then for each output site the sum of the
    products that its taps reach. Where outputs are no more than inputs, in number and in channels, this computes as
    much, moves less, and its matrices have the better shape: 15 to 25 % faster on CPU at 64 to 128 channels."""
    taps, channels = kernel_map.table.shape[1], rows.shape[1]
    by_tap = packed.view(len(packed), taps, channels).transpose(0, 1)
    step = max(16, CHUNK // (taps * len(rows)) // 16 * 16)
    parts = []
    for first in range(0, len(packed), step):
        weight = by_tap[:, first : first + step].reshape(-1, channels)
        products = torch.mm(rows[:-1], weight.T)  # the row of zeros serves all taps that find none
        parts.append(F.embedding_bag(kernel_map.products, products.view(-1, len(weight) // taps), mode="sum"))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out.add_(bias)


class _GatherProduct(torch.autograd.Function):
    """rows (n_in + 2, C), packed (groups, O / groups, taps * I), bias (O,) or None -> rows (n_out, O)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(rows, packed)
        ctx.kernel_map = kernel_map
        return _gather_product(rows, packed, bias, kernel_map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, packed = ctx.saved_tensors
        groups = packed.shape[0]
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_packed = torch.zeros_like(packed)
        for sites, gather, columns in _chunks(rows, ctx.kernel_map):
            out = _split(grad[sites][:, None], groups)  # (groups, n, O / groups)
            grad_packed.baddbmm_(out.mT, _split(columns, groups))
            if grad_rows is not None:
                back = (out @ packed).view(groups, *columns.shape[:2], rows.shape[1] // groups)
                grad_rows.index_add_(0, gather, back.permute(1, 2, 0, 3).reshape(-1, rows.shape[1]))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_rows, grad_packed, grad_bias, None


def _chunks(rows: Tensor, kernel_map: KernelMap) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Output sites chunk by chunk: which, the rows their taps read, and these rows' features (n, taps, C)."""
    count, taps = kernel_map.table.shape
    reads = kernel_map.table.view(-1)
    step = max(1, CHUNK // (taps * rows.shape[1]))
    for start in range(0, max(1, count), step):  # one empty chunk for no sites
        sites = slice(start, min(start + step, count))
        gather = reads[sites.start * taps : sites.stop * taps]
        yield sites, gather, rows.index_select(0, gather).view(-1, taps, rows.shape[1])
